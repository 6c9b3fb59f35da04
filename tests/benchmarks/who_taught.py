"""Who taught whom? Right names and false alarms: ``python tests/benchmarks/who_taught.py``.

Asks for the teacher of every shipped student, and of some that are trained here: with other temperatures, another
weight of the teacher, noisy labels, another architecture, or fine-tuned on labels afterwards (about half an hour on 2
cores). Each is asked with random sets of four candidates, three of them of the teacher's kind, with the teacher among
them and without it; and so are networks that had no teacher, or one that knows nothing. For each there is a *mixed* set
as well, with one candidate of the teacher's kind and three others that are wrongly said to be like it. Stores the table
of page 6.
"""

import copy
import random
import time
import warnings
from dataclasses import dataclass

import joblib
import pandas as pd
import torch
import torch.nn.functional as F

import kdx
from kdx.data.augmentation import augment
from kdx.distil.answers import answers
from kdx.distil.cross_validation import fit_all
from kdx.distil.fit import Job, evaluate
from kdx.distil.run_store import find_run, shipped_table
from kdx.distil.studies import STUDIES
from kdx.explain.regression import FitWarning
from kdx.pages import results
from kdx.planted.plantings import shuffled

SETS = 3  # of candidates, for each student
FEW = (30, 100, 300, 600, 2000)  # images
LARGE, SMALL = ("teacher", "resnet18@0.1875"), ("base", "second base", "reordered base", "resnet10@0.125")
TAUGHT = {"response": "teacher", "overhaul": "teacher", "attention": "teacher", "second student": "teacher"}
TAUGHT |= {"self-distilled": "base"}
NAMES = {"resnet18@0.25": "teacher", "resnet10@0.1875": "base"}  # what networks of the ladder are called as teachers
UNTAUGHT = ("second base", "reordered base", "resnet10@0.125, second base", "random teacher")


@dataclass
class Student:
    group: str
    name: str
    fold: int
    logits: torch.Tensor
    base: torch.Tensor
    teacher: tuple | None  # role and fold, or None


def shipped(dataset, images):
    """(role, fold) -> logits of every shipped network."""
    table = shipped_table()
    rows = table[table["dataset"] == dataset].to_dict("records")
    return {(r["role"], r["fold"]): answers(find_run(r["sha256"][:32]), images, "cpu").logits for r in rows}


def students_of(z):
    """Every shipped student with its base, and networks without a teacher in the student's place."""
    for role, fold in z:
        name = TAUGHT.get(role)
        base, group = "base", role if role in TAUGHT else "untaught"
        if " > " in role:
            head, own = role.rsplit(" > ", 1)
            name, group = NAMES.get(head, head), "ladder"
            base = own if own == "resnet10@0.125" else "base"
        elif role == "self-distilled" or role == "resnet10@0.125, second base":
            base = "second base" if role == "self-distilled" else "resnet10@0.125"
        elif role == "random teacher":
            group = role
        teacher = (name, fold)
        if group in ("untaught", "random teacher") and role not in UNTAUGHT:
            continue
        if (group not in ("untaught", "random teacher") and teacher not in z) or teacher == (base, fold):
            continue
        if (base, fold) in z:
            yield Student(group, role, fold, z[role, fold], z[base, fold], teacher if name else None)


def trained(z, train, test):
    """Further students, of fold 1, by a short recipe."""
    rows = kdx.folds(train.labels, 5)[0][0]
    part, few = train[rows].limit(12_000), test.limit(200)
    table = shipped_table()
    files = table[(table["dataset"] == "cifar10") & (table["fold"] == 1)].set_index("role")["sha256"]
    teacher = find_run(files["teacher"][:32])
    recipe = kdx.Recipe(epochs=8, sizes=kdx.Recipe.PROGRESSIVE)
    one = "resnet10@0.1875"
    noisy = shuffled(part)
    mixed = torch.where(
        torch.rand(len(part), generator=torch.Generator().manual_seed(0)) < 0.4, noisy.labels, part.labels
    )
    noisy.labels.copy_(mixed)
    common = {"recipe": recipe, "device": "cpu"}
    of_teacher = {"technique": "response", "teacher": teacher, **common}
    jobs = {
        "base": Job(one, part, few, seed=50, **common),
        "temperature 1": Job(one, part, few, seed=51, settings={"temperature": 1.0}, **of_teacher),
        "temperature 20": Job(one, part, few, seed=52, settings={"temperature": 20.0}, **of_teacher),
        "weight 0.1": Job(one, part, few, seed=53, settings={"alpha": 0.1}, **of_teacher),
        "noisy labels": Job(one, noisy, few, seed=54, **of_teacher),
        "base, resnet18@0.125": Job("resnet18@0.125", part, few, seed=55, **common),
        "resnet18@0.125": Job("resnet18@0.125", part, few, seed=56, **of_teacher),
    }
    runs = dict(fit_all(jobs, 2))
    logits = {name: evaluate(run.model, test, "cpu").logits for name, run in runs.items()}
    for name in ("temperature 1", "temperature 20", "weight 0.1", "noisy labels"):
        yield Student("short training", name, 1, logits[name], logits["base"], ("teacher", 1))
    yield Student(
        "short training", "resnet18@0.125", 1, logits["resnet18@0.125"], logits["base, resnet18@0.125"], ("teacher", 1)
    )
    for fold in range(1, 6):
        tuned = fine_tuned(kdx.load_network("cifar10", "response", fold), part, fold)
        found = evaluate(tuned, test, "cpu").logits
        yield Student("fine-tuned", "response", fold, found, z["base", fold], ("teacher", fold))


def fine_tuned(network, images, seed):
    """One more epoch on labels alone, at a tenth of the learning rate."""
    network = copy.deepcopy(network).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    torch.manual_seed(seed)
    for rows in torch.randperm(len(images)).split(128):
        x = images.card.normalize(augment(images.images[rows], images.card.augmentation))
        loss = F.cross_entropy(network(x), images.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def ask(student, z, candidates, alike, rows, teacher):
    """Whom each rule names, p, and how much the leads of the candidates alike vary."""
    names = {f"{role}, fold {fold}": z[role, fold][rows] for role, fold in candidates}
    true = "{}, fold {}".format(*teacher) if teacher in candidates else ""
    of, base = student.logits[rows], student.base[rows]
    peers = [f"{role}, fold {fold}" for role, fold in alike]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)
        table = kdx.who_taught(of, base, names, alike=peers)
    tested = table["p"].notna().any()
    by = {
        "share": table["candidate"][0],
        "agreement": max(names, key=lambda n: (names[n].argmax(1) == of.argmax(1)).double().mean()),
        "KL": min(names, key=lambda n: kl(of, names[n])),
        "CKA": max(names, key=lambda n: cka(names[n], of)),
    }
    right = {f"named by {rule}": name == true for rule, name in by.items()}
    accused = table.loc[table["p"].idxmin(), "candidate"] if tested else ""
    variance = table.loc[table["candidate"].isin(peers), "lead"].var()
    return right | {"p": table["p"].min(), "accused the teacher": tested and accused == true, "variance": variance}


def kl(student, teacher):
    """Mean divergence of a student's answers from a teacher's."""
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean")


def cka(x, y):
    """Linear CKA of answers."""
    x, y = (a.double() - a.double().mean(0) for a in (x, y))
    return float((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def asked(students, z, dataset, source, counts):
    """Rows of the table; fewer images than the most are asked of one set of candidates."""
    one = joblib.delayed(asked_of)
    return [row for rows in joblib.Parallel(2)(one(s, z, dataset, source, counts) for s in students) for row in rows]


def asked_of(student, z, dataset, source, counts):
    torch.set_num_threads(1)
    rng, found = random.Random(f"{student.name} {student.fold}"), []
    order = torch.randperm(len(student.logits), generator=torch.Generator().manual_seed(1))
    pool = [c for c in z if c[0] in LARGE + SMALL and c != student.teacher]
    pool = [c for c in pool if not any(torch.equal(z[c], other) for other in (student.logits, student.base))]
    kinds = [[c for c in pool if c[0] in of] for of in (LARGE, SMALL)]
    if student.teacher and student.teacher[0] in SMALL:
        kinds = kinds[::-1]
    for repeat in range(SETS + 1):
        mixed = repeat == SETS
        first, second = (
            rng.sample(kind, min(n, len(kind))) for kind, n in zip(kinds, ((1, 3), (3, 1))[not mixed], strict=True)
        )
        for with_teacher in (True, False) if student.teacher else (False,):
            ours = [student.teacher, *first[1:]] if with_teacher else first
            candidates = [*ours, *second]
            for count in counts if not repeat else counts[-1:]:
                rows = order[:count]
                found.append(
                    {
                        "dataset": dataset, "source": source, "group": student.group, "student": student.name,
                        "fold": student.fold, "set": "mixed" if mixed else repeat, "teacher": with_teacher,
                        "images": len(rows),
                        **ask(student, z, candidates, candidates if mixed else ours, rows, student.teacher),
                    }
                )  # fmt: skip
    return found


def main():
    start, rows = time.perf_counter(), []
    studies = {study.dataset: study for study in STUDIES}
    test, train = (studies["cifar10"].images(split) for split in ("test", "train"))
    z = shipped("cifar10", test)
    students, further = list(students_of(z)), list(trained(z, train, test))
    print(f"trained: {time.perf_counter() - start:.0f} s", flush=True)
    rows += asked(students, z, "cifar10", "test", FEW)
    rows += asked(further, z, "cifar10", "test", (2000,))
    print(f"asked: {time.perf_counter() - start:.0f} s", flush=True)
    drawn = kdx.load_dataset("shapes", "test", limit=1600, size=32, normalisation=(test.card.mean, test.card.std))
    elsewhere = shipped("cifar10", drawn)
    of_drawn = [
        Student(s.group, s.name, s.fold, elsewhere[s.name, s.fold], elsewhere[base], s.teacher)
        for s in students
        for base in [next(place for place in z if torch.equal(z[place], s.base))]
    ]
    rows += asked(of_drawn, elsewhere, "cifar10", "generated", (2000,))
    for name in ("petimages", "plantvillage"):
        of = shipped(name, studies[name].images("test"))
        rows += asked(list(students_of(of)), of, name, "test", (2000,))
    table = pd.DataFrame(rows)
    seconds = time.perf_counter() - start
    results.store("who_taught", table.round(4), "python tests/benchmarks/who_taught.py", seconds)
    main_rows = table[
        (table["source"] == "test") & (table["images"] == table.groupby("dataset")["images"].transform("max"))
    ]
    rates = main_rows.assign(p=main_rows["p"] <= 0.05, mixed=main_rows["set"] == "mixed")
    print(rates.groupby(["dataset", "group", "mixed", "teacher"]).mean(numeric_only=True).to_string())


if __name__ == "__main__":
    main()
