import os
import time

import pytest
import torch
from torch import nn

from kdx.distil.checkpoints import OLD, Kept, put_back, state_of


def test_what_is_kept_is_read_back_and_replaced(home):
    kept = Kept("a")
    assert kept.load() == {}
    for epochs in (1, 2):
        kept.save({"epochs": epochs, "records": [{"split": "train", "loss": 0.5}], "w": torch.ones(2)})
    assert [path.name for path in (home / "runs").iterdir()] == [".a.partial"]
    assert kept.load()["epochs"] == 2
    assert torch.equal(kept.load()["w"], torch.ones(2))
    kept.drop()
    kept.drop()
    assert not list((home / "runs").iterdir())


def test_what_cannot_be_written_leaves_the_epoch_before(home):
    kept = Kept("a")
    kept.save({"epochs": 1})
    with pytest.raises(Exception, match="pickle"):
        kept.save({"epochs": lambda: None})
    assert [path.name for path in (home / "runs").iterdir()] == [".a.partial"]
    assert kept.load() == {"epochs": 1}


@pytest.mark.parametrize("content", [b"", b"nothing", b"PK\x03\x04 cut"])
def test_a_damaged_file_is_named(home, content):
    kept = Kept("a")
    kept.save({"epochs": 1})
    kept.path.write_bytes(content)
    with pytest.raises(ValueError, match=r"\.a\.partial, is damaged .* delete that file to begin anew"):
        kept.load()


def test_what_no_training_went_on_from_is_deleted_in_the_end(home):
    for key, age in (("old", OLD + 60), ("new", 0)):
        Kept(key).save({"epochs": 1})
        os.utime(Kept(key).path, (time.time() - age,) * 2)
    Kept("mine").drop()
    assert [path.name for path in (home / "runs").iterdir()] == [".new.partial"]


class Counts(nn.Module):
    """A parameter, a buffer, and a tensor that is neither."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
        self.register_buffer("b", torch.zeros(1))
        self.loose = torch.zeros(1)


def test_modules_optimizers_and_random_numbers_go_back():
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

    with torch.random.fork_rng():
        step()
        kept = Kept("a")
        kept.save(state_of(parts, generator, 1))
        expected = [step(), step()]
        assert put_back(kept.load(), parts, generator) == 1
        assert [step(), step()] == expected
    assert [row[1:] for row in expected] == [[2, 2], [3, 3]]
