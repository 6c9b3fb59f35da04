import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import kdx
from kdx.networks.stages import evaluating
from kdx.networks.threads import hooked, locked
from tests.networks import Small, at_once, state

SOON = 20  # seconds after which a thread that waits is one that waits for ever


class With(nn.Module):
    """A head on a backbone that may have other heads."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.backbone(x))


def enters(inside, other, patience):
    """Whether another thread can lock ``other`` within seconds, while this one is in a block of ``inside``."""
    entered = threading.Event()

    def enter():
        with locked(*other):
            entered.set()

    with ThreadPoolExecutor(1) as pool:
        with locked(*inside):
            task = pool.submit(enter)
            found = entered.wait(patience)
        task.result(SOON)
    return found


def test_locked_excludes_other_threads_from_networks_with_common_modules():
    backbone, other = Small(), Small()
    one, two = With(backbone), With(backbone)
    assert not enters([other], [other], 0.1)
    assert not enters([other], [nn.DataParallel(other)], 0.1)
    assert not enters([backbone], [one], 0.1)  # whichever of the two was seen first
    assert not enters([two], [backbone], 0.1)
    assert not enters([one], [two], 0.1)
    assert enters([one], [other], SOON)
    assert enters([other], [With(Small())], SOON)
    other.head = one.head  # common from now on
    assert not enters([one], [other], 0.1)


def test_locked_may_be_entered_again_and_is_left_after_exceptions():
    network = Small()
    with pytest.raises(RuntimeError, match="halt"), locked(network), locked(network.a), locked(network):
        raise RuntimeError("halt")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(enters, [network], [network], 0.1).result(SOON) is False


def test_locked_takes_several_networks_in_one_order():
    """Each thread names two of three networks, in all orders, many times over."""
    networks = [Small(), Small(), With(Small())]
    pairs = [(a, b) for a in networks for b in networks if a is not b]
    counts = dict.fromkeys(networks, 0)

    def work(i):
        for a, b in pairs[i % 6 :] + pairs[: i % 6]:
            with locked(a, b):
                for network in (a, b):
                    before = counts[network]
                    torch.rand(3).sum()
                    counts[network] = before + 1

    at_once(work, threads=6, calls=10)
    assert set(counts.values()) == {6 * 10 * 4}


def test_locks_do_not_keep_networks_alive():
    network = Small()
    with evaluating(network):
        assert network.a in locked._locks
    modules = [weakref.ref(module) for module in network.modules()]
    del network
    assert not any(module() for module in modules)


def test_hooked_sees_the_calls_of_its_thread_alone():
    layer, seen = nn.Identity(), []

    def hook(module, args, output):
        seen.append(output)
        return -output

    x = torch.ones(1)
    with ThreadPoolExecutor(1) as pool, hooked([("layer", layer.register_forward_hook, hook)]):
        assert layer(x) == -1
        assert pool.submit(layer, x).result() == 1
    assert len(seen) == 1
    assert not layer._forward_hooks


class Sticky(nn.Identity):
    """Gives a handle that does not remove its hook."""

    def register_forward_hook(self, hook):
        handle = super().register_forward_hook(hook)

        def remove():
            raise OSError("it stays")

        handle.remove = remove
        return handle


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_module_that_takes_no_hooks_or_keeps_them_says_so():
    model = nn.Sequential(nn.Identity(), Sticky(), nn.Identity())
    layers = {"L1": "0", "L2": "1", "L3": "2"}
    with pytest.raises(ValueError, match=r"^1: .* gives its hooks back; .*\(it stays\)"), kdx.capture(model, layers):
        pass
    assert [len(module._forward_hooks) for module in model] == [0, 1, 0]  # the others are removed
    compiled = nn.Sequential(nn.Identity(), torch.jit.script(nn.Sequential(nn.Identity())))
    layers = {"L1": "0", "L2": "1"}
    with (
        pytest.raises(ValueError, match=r"^1: .* takes hooks; build it without torch.jit"),
        kdx.capture(compiled, layers),
    ):
        pass
    assert not compiled[0]._forward_hooks


@pytest.mark.filterwarnings("ignore:.*reference images for")
def test_every_function_may_share_networks_between_threads(one_thread):
    """Student and base in either order, in training mode, and the base inside of another network."""
    student, base = Small().train(), Small(width=6, seed=1).train()
    x, many = torch.rand(2, 3, 16, 16), torch.rand(8, 3, 16, 16)
    references = [kdx.Reference(student, base, many), kdx.Reference(base, nn.DataParallel(student), many)]
    wrapped = nn.Sequential(base, nn.Linear(6, 3)).train()
    layers, calls = {"L1": "0.a", "L2": "0.c"}, []

    def work(i):
        maps = kdx.unexplained(references[i % 2], x)
        found = {**maps.distilled, **{f"{stage} residual": m for stage, m in maps.residual.items()}}
        found |= {f"{stage} alone": m for stage, m in kdx.grad_cam((student, base)[i % 2], x, 1).items()}
        found |= {f"{stage} wrapped": m for stage, m in kdx.activations(wrapped, x, layers).items()}
        return found, kdx.stages((base, student)[i % 2], x)

    expected = [work(i) for i in range(2)]
    before = [state(network) for network in (student, wrapped)]
    for i, (found, names) in at_once(work, threads=8, calls=4):
        calls.append(i)
        assert names == expected[i % 2][1]
        assert all(torch.equal(m, expected[i % 2][0][name]) for name, m in found.items())
    assert len(calls) == 32
    assert [state(network) for network in (student, wrapped)] == before
