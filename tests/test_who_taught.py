import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import kdx
from kdx.cli import app
from kdx.explain.regression import FitWarning
from kdx.measure import who_taught as module
from kdx.measure.who_taught import _p_of_lead, verdict
from kdx.networks.models import save_checkpoint
from tests.networks import Small


def answers(n=1200, classes=6, networks=8, seed=0):
    """Answers of networks that have something in common, and much of their own: (networks, n, classes)."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(n, classes, generator=generator)
    return common + torch.randn(networks, n, classes, generator=generator)


def test_the_teacher_is_named_and_an_absent_one_is_not():
    z = answers()
    student = 0.5 * (z[1] + answers(seed=1)[0])
    with_it = kdx.who_taught(
        student, z[0], {"a": z[2], "teacher": z[1], "b": z[3], "c": z[4]}, alike=["a", "teacher", "b", "c"]
    )
    assert with_it["candidate"][0] == "teacher"
    assert with_it.columns.tolist() == ["candidate", "share", "low", "high", "lead", "p"]
    assert with_it["p"][0] < 0.001
    assert (with_it["p"][1:] == 1).all()
    assert verdict(with_it).startswith("Taught by teacher, which explains")
    without = kdx.who_taught(student, z[0], {"a": z[2], "b": z[3], "c": z[4], "d": z[5]}, alike=["a", "b", "c", "d"])
    assert without["p"].min() > 0.3
    assert verdict(without).startswith("None of the candidates stands out from those like it (p ")


def test_shares_of_a_mix():
    """The student is base + teacher + noise of the same size, all independent."""
    z = torch.randn(5, 3000, 4, generator=torch.Generator().manual_seed(0))
    table = kdx.who_taught(z[0] + z[1] + z[2], z[0], {"teacher": z[1], "other": z[3]}).set_index("candidate")
    assert table["share"].to_dict() == pytest.approx({"teacher": 0.5, "other": 0}, abs=0.03)
    assert table["low"]["teacher"] < 0.5 < table["high"]["teacher"]
    assert table["lead"].to_dict() == pytest.approx({"teacher": 0.5**0.5, "other": 0}, abs=0.04)


def test_further_bases_take_away_what_any_network_knows():
    z = answers(networks=6)
    student = z[4] + z[5]
    one = kdx.who_taught(student, z[0], {"a": z[3], "b": z[2]})
    two = kdx.who_taught(student, z[0], {"a": z[3], "b": z[2]}, bases=[z[1]])
    assert (two["share"] < one["share"]).all()


def test_p_is_the_probability_of_such_a_lead():
    draws = np.sort(np.random.default_rng(0).normal(size=(200_000, 4)), axis=1)
    for lead in (0.2, 1.0, 2.0):
        assert _p_of_lead(lead, 4) == pytest.approx((draws[:, -1] - draws[:, -2] >= lead).mean(), abs=0.005)
    assert _p_of_lead(0, 4) == _p_of_lead(-1, 4) == 1


def test_p_is_not_given_where_it_cannot_be():
    z = answers()
    for candidates, alike in (({"a": z[1]}, ["a"]), ({"a": z[1], "b": z[2]}, None), ({"a": z[1], "b": z[2]}, ["b"])):
        table = kdx.who_taught(z[0] + z[1], z[0], candidates, alike=alike)
        assert table["p"].isna().all()
        assert "was not tested" in verdict(table)
    few = answers(n=200)
    with pytest.warns(
        FitWarning, match="200 images are too few for a p with 24 answers of 4 networks; use 240 or more"
    ):
        table = kdx.who_taught(few[0] + few[1], few[0], {"a": few[1], "b": few[2]}, alike=["a", "b"])
    assert table["candidate"][0] == "a"
    assert table[["lead", "p"]].isna().all(None)


@pytest.mark.parametrize("own", [1.0, 0.2, 0.05])
def test_a_student_that_follows_exactly_is_found_too(own):
    """Base and teacher are inversely related if the student is known; that must not count."""
    z = answers()
    others = {"teacher": z[1], "a": z[2], "b": z[3]}
    table = kdx.who_taught(z[0] + z[1] + own * z[4], z[0], others, alike=list(others))
    assert table["candidate"][0] == "teacher"
    assert table["p"][0] < 0.01


def test_false_alarms_are_rare_among_networks_alike_and_depend_on_the_spread(monkeypatch):
    """A student of a teacher that is not among the candidates, which differ by chance in how near they are to it."""

    def rate(spread):
        monkeypatch.setattr(module, "SPREAD", spread)
        found = []
        for seed in range(20):
            z, near = answers(n=400, classes=3, seed=seed), torch.rand(4, generator=torch.Generator().manual_seed(seed))
            candidates = {str(i): z[i + 1] + 2 * near[i] * z[6] for i in range(4)}
            table = kdx.who_taught(z[6] + 0.5 * z[7], z[0], candidates, alike=list(candidates))
            found.append(table["p"].min() <= 0.05)
        return np.mean(found)

    assert rate(0.3) < 0.05 + 4 * (0.05 * 0.95 / 20) ** 0.5
    assert rate(1e-6) >= 0.3


def test_networks_are_alike_if_their_weights_have_the_same_shapes():
    x = torch.randn(300, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    networks = {"a": Small(3, seed=2), "b": Small(3, seed=3), "wide": Small(4, seed=4)}
    table = kdx.who_taught(Small(3, seed=0), Small(3, seed=1), networks, x).set_index("candidate")
    assert table["p"].notna().to_dict() == {"a": True, "b": True, "wide": False}
    for wrong in (["c"], "a"):
        with pytest.raises(ValueError, match="alike: expected some of the candidates a, b, wide, got"):
            kdx.who_taught(Small(3, seed=0), Small(3, seed=1), networks, x, alike=wrong)


def test_networks_functions_and_answers_are_asked_once():
    x = torch.randn(60, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    calls = []

    class Counted(Small):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)

    networks = [Counted(seed=i).eval() for i in range(5)]
    with torch.no_grad():
        given = networks[3](x)
        calls.clear()
    with pytest.warns(FitWarning):
        table = kdx.who_taught(
            networks[0],
            networks[1],
            {"network": networks[2], "function": lambda x: networks[4](x), "answers": given},
            x,
        )
    assert sum(calls) == 4 * 60
    assert set(table["candidate"]) == {"network", "function", "answers"}


def test_bad_input_is_named():
    z = answers(n=100)
    for message, arguments in {
        "candidates: expected name -> network, got dict": (z[0], z[1], {}),
        "a gives the answers of student": (z[0], z[1], {"a": z[0]}),
        "a gives the answers of base": (z[0], z[1], {"a": 2 * z[1]}),
        "base gives the answers of student": (z[0], z[0], {"a": z[1]}),
        "b gives the answers of a": (z[0], z[1], {"a": z[2], "b": z[2] + 1}),
        "candidates: expected other names than base": (z[0], z[1], {"base": z[2]}),
        "expected answers to the same images, got 100 .student., 100 .base., 99 .a.": (z[0], z[1], {"a": z[2, :99]}),
        "images: expected 30 or more, got 20": (z[0, :20], z[1, :20], {"a": z[2, :20]}),
        "base gives the same answer to every image": (z[0], torch.ones(100, 6), {"a": z[2]}),
        "a: expected finite answers": (z[0], z[1], {"a": z[2] * torch.nan}),
        "images: expected some for student, which is a network": (Small(), z[1], {"a": z[2]}),
    }.items():
        with pytest.raises(ValueError, match=message):
            kdx.who_taught(*arguments)


@pytest.mark.filterwarnings("ignore::kdx.explain.regression.FitWarning")
def test_command_line(tmp_path):
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "photos").mkdir()
    for i in range(40):
        pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=generator).numpy()
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    files = []
    for i in range(4):
        files.append(str(tmp_path / f"{i}.pt"))
        torch.save(Small(seed=i).state_dict(), files[-1])
    student, base, one, other = files
    command = ["who-taught", "--student", student, "--base", base, "--candidate", one, "--candidate", f"other={other}"]
    command += ["--data", str(tmp_path / "photos"), "--build", "tests.networks:Small", "--size", "16"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "was not tested" in result.output
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert found["images"] == 40
    assert {row["candidate"] for row in found["candidates"]} == {"2", "other"}
    assert found["candidates"][0]["p"] is None
    other_name = tmp_path / "lr=0.1.pt"
    torch.save(Small(seed=7).state_dict(), other_name)
    found = json.loads(CliRunner().invoke(app, [*command, "--candidate", str(other_name), "--json"]).stdout)
    assert {row["candidate"] for row in found["candidates"]} == {"2", "other", "lr=0.1"}
    twice = CliRunner().invoke(app, [*command, "--candidate", f"other={one}"])
    assert twice.exit_code == 2
    assert "several have one name" in twice.stderr
    unlike = []
    for name, width in (("narrow", 0.125), ("wide", 0.25)):
        unlike.append(str(tmp_path / f"{name}.safetensors"))
        save_checkpoint(Path(unlike[-1]), kdx.build("resnet10", 3, "small", width, seed=0), {"classes": list("abc")})
    for more, message in (
        (
            ["--base2", unlike[0], "--student", unlike[1]],
            "agree in classes, architecture, got the architecture",
        ),
        (
            ["--alike", "--candidate", unlike[0], "--candidate", unlike[1]],
            "agree in classes, architecture, got the architecture",
        ),
        (["--build", "", "--student", "gone.pt"], "no file gone.pt; expected a checkpoint"),
        (["--limit", "-3"], "'--limit'"),
        (["--size", "-4"], "'--size'"),
    ):
        refused = CliRunner().invoke(app, [*command, *more])
        assert refused.exit_code == 2
        assert message in " ".join(refused.stderr.split())
