import os

import pytest

from kdx.cli_stores import use_cluster
from tests.test_cli import cli  # noqa: F401


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "99_nothing", "-p", "seed=0:2", "--out", "x"], "choose from: 00_data, 01_gradcam"),
        (["sweep", "01_gradcam", "-p", "sed=0:2", "--out", "x"], "unknown parameters sed; choose from: dataset"),
        (["sweep", "01_gradcam", "-p", "seed=[2", "--out", "x"], "-p seed=[2: expected values such as 0:10"),
        (["run", "01_gradcam", "--cluster", "10.0.0.1"], "cluster: expected an address such as tcp://"),
        (["book", "--cluster", "no.json"], "cluster: expected an address such as tcp://"),
        (["networks", "train", "--cluster", "no.json"], "cluster: expected an address such as tcp://"),
    ],
)
def test_errors_are_one_message_and_exit_code_1(cli, arguments, message):  # noqa: F811
    result = cli(*arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_cluster_reaches_the_kernels_through_the_environment(monkeypatch):
    monkeypatch.setenv("KDX_CLUSTER", "tcp://10.0.0.1:8786")
    assert use_cluster("") == "tcp://10.0.0.1:8786"
    assert use_cluster("tcp://10.0.0.2:8786") == os.environ["KDX_CLUSTER"] == "tcp://10.0.0.2:8786"
