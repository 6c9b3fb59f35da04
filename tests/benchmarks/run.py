"""Time and peak memory of kdx and of other implementations, all in one run, on one machine.

python tests/benchmarks/run.py            prints the table (about ten minutes)
python tests/benchmarks/run.py --write    also stores it for the book (book/benchmarks*.csv)
python tests/benchmarks/run.py --job JOB  runs one job, the name of a function below, in this process

Every job runs in its own process, which reports its median time and its peak memory. If a ratio matters to a few
percent, the jobs alternate in several processes each and the median counts: the memory layout of a process alone
changes the time of a bare forward pass by a tenth.
"""

import csv
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import timeit
from pathlib import Path
from statistics import median

import torch
import torchvision
from torchvision.transforms import v2

import kdx
from kdx import distance
from kdx.data.folders import find_roots
from kdx.data.sources import find_source
from kdx.networks.devices import autocast

N, SIZE = 16, 224
BOOK = Path(__file__).resolve().parents[2] / "book"


def seconds(work, rounds=1):
    return median(timeit.repeat(work, number=1, repeat=rounds))


# --- training: resnet10 of width 1/4, 10,000 images of 32 px ----------------------------------

STEPS, BATCH = 156, 64


def cifar_like():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (STEPS * BATCH, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return kdx.Dataset(images, torch.arange(len(images)) % 10, kdx.DATASETS["cifar10"])


def fit_kdx():
    with tempfile.TemporaryDirectory() as home:
        os.environ["KDX_HOME"] = home
        train = cifar_like()
        recipe = kdx.Recipe(epochs=1, batch_size=BATCH, sizes=(1.0,))
        few = train[torch.arange(BATCH)]
        kdx.fit("resnet10", few, few, recipe=recipe, stem="small")  # warms up
        return seconds(lambda: kdx.fit("resnet10", train, few, recipe=recipe, stem="small"))


def fit_bare():
    """The same steps on floats without augmentation, in the shortest possible loop."""
    train, layout = cifar_like(), torch.channels_last
    images, labels = train.card.normalize(train.images).contiguous(memory_format=layout), train.labels
    model = kdx.build("resnet10", 10, "small").to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, nesterov=True, weight_decay=5e-4, fused=True)

    def steps(n):
        for x, y in zip(images.split(BATCH)[:n], labels.split(BATCH)[:n], strict=True):
            with autocast(x.device):
                logits = model(x)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, y).backward()
            optimizer.step()

    steps(5)
    return seconds(lambda: steps(STEPS))


# --- UniCAM: ResNet-50, four stages, both directions ------------------------------------------


def pair():
    torch.manual_seed(0)
    networks = [torchvision.models.resnet50(weights=None).eval() for _ in range(2)]
    labels = torch.randn(4, 384)[torch.arange(N) % 4]
    return *networks, torch.rand(N, 3, SIZE, SIZE), labels


def forwards():
    student, base, x, _ = pair()

    def work():
        with torch.no_grad():
            student(x)
            base(x)

    work()
    return seconds(work, 5)


def unicam():
    student, base, x, g = pair()
    unique = lambda: kdx.unicam(kdx.Reference(student, base, x), g)  # noqa: E731
    unique()
    return seconds(unique, 5)


def unicam_autograd():
    """From the formulas, with the n x n x d tensor of differences and one backward pass per map."""
    student, base, x, g = pair()
    layers = kdx.stages(student, x)

    def centred(features):
        features = features.flatten(1)
        difference = features[:, None] - features
        squared = difference.square().sum(2)
        d = torch.where(squared > 0, squared, 1.0).sqrt() * (squared > 0)
        p = d - d.sum(1)[:, None] / (N - 2) - d.sum(0) / (N - 2) + d.sum() / ((N - 1) * (N - 2))
        return p * (1 - torch.eye(N))

    def maps(model, other):
        for stage in layers:
            with kdx.capture(model, {stage: layers[stage]}) as one, kdx.capture(other, {stage: layers[stage]}) as two:
                model(x)
                with torch.no_grad():
                    other(x)
            a, p_g = one[stage], centred(g)
            p, q = centred(a), centred(two[stage]).detach()
            u = p - (p * q).sum() / (q * q).sum() * q
            r = (u * p_g).sum() / ((u * u).sum() * (p_g * p_g).sum()).sqrt()
            (gradient,) = torch.autograd.grad(r, a)
            torch.einsum("nk,nkhw->nhw", gradient.mean((2, 3)), a).relu()

    return seconds(lambda: (maps(student, base), maps(base, student)))


# --- distance correlation ------------------------------------------------------------------


def samples(n):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 512, generator=generator, dtype=torch.float64) for _ in range(2)]


def dcor_kdx():
    x, y = samples(2000)
    distance.distance_correlation(x, y)
    return seconds(lambda: distance.distance_correlation(x, y), 7)


def dcor_kdx_large():
    x, y = samples(20_000)
    return seconds(lambda: distance.distance_correlation(x, y))


def dcor_cdist():
    x, y = samples(2000)

    def work():
        return distance.cosine(*(distance.u_center(torch.cdist(s, s)) for s in (x, y)))

    work()
    return seconds(work, 7)


def dcor_dcor():
    import dcor

    x, y = (s.numpy() for s in samples(2000))
    return seconds(lambda: dcor.u_distance_correlation_sqr(x, y))


# --- Grad-CAM at four stages -----------------------------------------------------------------


def gradcam_kdx():
    model, _, x, _ = pair()
    target = torch.arange(N)
    kdx.grad_cam(model, x, target)
    return seconds(lambda: kdx.grad_cam(model, x, target), 3)


def gradcam_floor():
    """One forward and one backward pass of the frozen network, differentiated down to L1."""
    return seconds(floor_of(pair()[0], torch.rand(N, 3, SIZE, SIZE)), 3)


def floor_of(model, x):
    model.requires_grad_(False)

    def work():
        with torch.no_grad():
            a = model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(x)))))
        a.requires_grad_()
        logits = model.fc(model.avgpool(model.layer4(model.layer3(model.layer2(a)))).flatten(1))
        torch.autograd.grad(logits.gather(1, torch.arange(N)[:, None]).sum(), a)

    work()
    return work


def gradcam_captum():
    from captum.attr import LayerGradCam

    model, _, x, _ = pair()
    layers = [model.get_submodule(name) for name in kdx.stages(model, x).values()]
    return seconds(lambda: [LayerGradCam(model, m).attribute(x, torch.arange(N)) for m in layers])


def gradcam_library():
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, _, x, _ = pair()
    targets = [ClassifierOutputTarget(i) for i in range(N)]

    def work():
        for name in kdx.stages(model, x).values():
            with GradCAM(model, [model.get_submodule(name)]) as cam:
                cam(x, targets)

    return seconds(work)


# --- an epoch of photographs: from the prepared cache, and from their files ---------------------


def photographs():
    """The folder of PlantVillage's JPEG files, or None if it is not on this machine."""
    return find_source(kdx.DATASETS["plantvillage"])


def epoch_cache():
    """Batches of 64 normalised images of 96 px from memory, as in `fit` but without augmentation."""
    train = kdx.load_dataset("plantvillage", "train")

    def work():
        for rows in torch.randperm(len(train)).split(64):
            train.card.normalize(train.images[rows])

    work()
    return seconds(work, 7) / len(train) * 1000


def epoch_files():
    """The same from the JPEG files, with torchvision's ImageFolder and a loader with two processes."""
    card = kdx.DATASETS["plantvillage"]
    steps = [v2.Resize(96), v2.CenterCrop(96), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    steps += [v2.Normalize([0.5] * 3, [0.2] * 3)]
    root = find_roots(photographs(), card.layout)[0][0]
    files = torchvision.datasets.ImageFolder(root, v2.Compose(steps))
    few = torch.utils.data.Subset(files, torch.randperm(len(files))[:1000].tolist())
    loader = torch.utils.data.DataLoader(few, 64, shuffle=True, num_workers=2, persistent_workers=True)

    def work():
        for _ in loader:
            pass

    work()
    return seconds(work, 3) / len(few) * 1000


# --- the table -------------------------------------------------------------------------------


def measure(job):
    """Seconds and peak memory in GB of a job in a new process."""
    command = [sys.executable, __file__, "--job", job]
    print(f"  {job} ...", end=" ", flush=True)
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    print(f"{found['seconds']:.3f} s, {found['peak']:.2f} GB", flush=True)
    return found


def compare(work, ours, peers, turns=1):
    jobs = {"kdx": ours} | peers
    found = {by: [] for by in jobs}
    for turn in range(turns):
        for by in jobs if turn % 2 == 0 else reversed(jobs):
            found[by].append(measure(jobs[by]))
    medians = {by: {key: median(one[key] for one in ones) for key in ones[0]} for by, ones in found.items()}
    return [
        {
            "work": work,
            "by": by,
            "seconds": f"{of['seconds']:.3g}",
            "x kdx": f"{of['seconds'] / medians['kdx']['seconds']:.3g}",
            "peak GB": f"{of['peak']:.2f}",
        }
        for by, of in medians.items()
    ]


def table():
    from road import rows as road_rows

    work = f"UniCAM, ResNet-50 pair, {N} images of {SIZE} px"
    rows = compare(work, "unicam", {"the two bare forwards": "forwards"}, turns=5)
    rows += compare(work, "unicam", {"plain autograd": "unicam_autograd"})[1:]
    rows += compare(
        "distance correlation, n = 2,000, d = 512",
        "dcor_kdx",
        {"torch.cdist and U-centring": "dcor_cdist", "dcor": "dcor_dcor"},
    )
    rows += compare("distance correlation, n = 20,000, d = 512", "dcor_kdx_large", {})
    work = f"Grad-CAM at L1 to L4, ResNet-50, {N} images of {SIZE} px"
    rows += compare(work, "gradcam_kdx", {"one forward and backward": "gradcam_floor"}, turns=3)
    rows += compare(work, "gradcam_kdx", {"captum": "gradcam_captum", "pytorch-grad-cam": "gradcam_library"})[1:]
    rows += compare(
        f"base training, resnet10 of width 1/4, {STEPS} batches of {BATCH} images of 32 px",
        "fit_kdx",
        {"the bare loop": "fit_bare"},
        turns=5,
    )
    if photographs():
        work = "an epoch over 1,000 photographs (JPEG, 256 px) at 96 px"
        rows += compare(work, "epoch_cache", {"decoding the files": "epoch_files"}, turns=3)
    else:
        print("PlantVillage is not on this machine: no rows about decoding photographs")
    for row in road_rows():
        rows.append({"work": row["work"], "by": "kdx", "seconds": f"{row['ours_s']:.3g}", "x kdx": "1", "peak GB": ""})
        rows.append(
            {
                "work": row["work"],
                "by": row["peer"],
                "seconds": f"{row['peer_s']:.3g}",
                "x kdx": f"{row['ratio']:.3g}",
                "peak GB": "",
            }
        )
    return rows


def machine():
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    return {
        "processor": cpu,
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GB",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "measured on": time.strftime("%Y-%m-%d"),
    }


def store(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    if "--job" in sys.argv:
        time_taken = globals()[sys.argv[2]]()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"seconds": time_taken, "peak": peak}))
    else:
        found = table()
        widths = {key: max(len(key), *(len(row[key]) for row in found)) for key in found[0]}
        for row in [{key: key for key in found[0]}, *found]:
            print("  ".join(row[key].ljust(width) for key, width in widths.items()))
        if "--write" in sys.argv:
            store(BOOK / "benchmarks.csv", found)
            store(BOOK / "benchmarks_machine.csv", [{"": k, "value": str(v)} for k, v in machine().items()])
