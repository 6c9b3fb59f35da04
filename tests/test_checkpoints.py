import os
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from kdx.distil.checkpoints import OLD, Kept, KeptWarning, put_back, state_of

CPU = torch.device("cpu")


def names(home):
    return sorted(path.name for path in (home / "runs").iterdir())


def test_what_is_kept_is_read_back_and_replaced(home):
    kept = Kept("a", CPU)
    assert kept.load() == {}
    for epochs in (1, 2):
        kept.save({"epochs": epochs, "records": [{"split": "train", "loss": 0.5}], "w": torch.ones(2)})
    assert names(home) == [".a.cpu.partial"]
    state = kept.load()
    assert (state["epochs"], state["records"]) == (2, [{"split": "train", "loss": 0.5}])
    assert torch.equal(state["w"], torch.ones(2))
    assert Kept("a", torch.device("cuda")).load() == {}
    kept.drop()
    kept.drop()
    assert names(home) == []


def test_seconds_count_on_without_the_time_between_two_attempts(home, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    kept = Kept("a", CPU)
    now[0] += 7
    kept.save({"epochs": 1})
    now[0] += 1000
    again = Kept("a", CPU)
    again.load()
    now[0] += 5
    assert again.seconds == 12


def test_on_a_full_disk_the_training_goes_on_and_the_epoch_before_stays(home, monkeypatch):
    kept = Kept("a", CPU)
    kept.save({"epochs": 1})
    for error in (OSError("No space left on device"), RuntimeError("[enforce fail at inline_container.cc:671]")):

        def fails(state, file, error=error):
            file.write(b"half")
            raise error

        monkeypatch.setattr(torch, "save", fails)
        with pytest.warns(KeptWarning, match=r"\.a\.cpu\.partial: not written .* free some space, or point KDX_HOME"):
            kept.save({"epochs": 2})
    assert names(home) == [".a.cpu.partial"]
    assert kept.load() == {"epochs": 1}


@pytest.mark.parametrize("content", [b"", b"nothing", b"PK\x03\x04 cut", b"\x80\x02\xff", {"epochs": 1}, [1], 3])
def test_a_damaged_file_is_named(home, content):
    kept = Kept("a", CPU)
    kept.save({"epochs": 1})
    assert kept.epochs == 1
    kept.path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, kept.path)
    with pytest.raises(ValueError, match=r"\.a\.cpu\.partial, is damaged .* delete that file to begin anew"):
        kept.load()


def test_what_no_training_went_on_from_is_deleted_in_the_end(home, monkeypatch):
    for key in ("old", "new", "used"):
        Kept(key, CPU).save({"epochs": 1})
    half = Kept("old", CPU).path.with_suffix(".123.partial")  # of a process that was killed as it wrote
    half.write_bytes(b"half")
    for path in (half, *(Kept(key, CPU).path for key in ("old", "used"))):
        os.utime(path, (time.time() - OLD - 60,) * 2)
    Kept("used", CPU).load()
    found = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [*found(self, pattern), self / ".gone.cpu.partial"])
    Kept("mine", CPU).drop()
    assert names(home) == [".new.cpu.partial", ".used.cpu.partial"]


class Counts(nn.Module):
    """A parameter, a buffer, and a tensor that is neither."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
        self.register_buffer("b", torch.zeros(1))
        self.loose = torch.zeros(1)


def test_modules_optimizers_and_random_numbers_go_back(home):
    module, generator = nn.Sequential(Counts()), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    parts = {"module": module, "optimizer": optimizer}

    def step():
        optimizer.zero_grad()
        (module[0].w * torch.rand(1) + torch.rand(1, generator=generator)).sum().backward()
        optimizer.step()
        module[0].b += 1
        module[0].loose = module[0].loose + 1
        return [module[0].w.item(), module[0].b.item(), module[0].loose.item()]

    with torch.random.fork_rng(), warnings.catch_warnings(action="error"):
        step()
        kept = Kept("a", CPU)
        kept.save(state_of(parts, generator, 1))
        expected = [step(), step()]
        assert put_back(kept.load(), parts, generator) == 1
        assert [step(), step()] == expected
    assert [row[1:] for row in expected] == [[2, 2], [3, 3]]
