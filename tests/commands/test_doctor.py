"""doctor: known conflicts are found, and a broken machine is an exit code."""

from pathlib import Path

import pytest

from mllm_jax.cli import main
from mllm_jax.commands import doctor

GOOD = {p: None for p in doctor.OPTIONAL} | {
    "jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8", "optax": "0.2.8", "orbax-checkpoint": "0.12.8", "grain": "0.2.18",
    "transformers": "5.23.0", "numpy": "2.4.6"}


def found(**changes: str | None) -> list[tuple[bool, str]]:
    return list(doctor.conflicts(GOOD | {k.replace("_", "-"): v for k, v in changes.items()}, (3, 11)))


def test_what_is_known_to_work_has_no_conflict():
    assert found() == []
    assert found(jax="0.11.2", jaxlib="0.11.2", flax="0.12.12", torch="2.13.0+cpu") == []


@pytest.mark.parametrize(("changes", "broken", "says"), [
    ({"jax": "0.9.1", "jaxlib": "0.9.1"}, True, "jax 0.9.1 is older than 0.10.2"),
    ({"jax": "0.11.0"}, True, "do not belong together"),
    ({"grain": "0.3.0"}, True, "grain 0.3.0 is not below 0.3"),
    ({"grain": None}, True, "grain is not installed"),
    ({"numpy": "1.26.4"}, True, "numpy 1.26.4 is older than 2.0"),
    ({"transformers": "4.57.1"}, True, "transformers 4.57.1 is older than 5.20"),
    ({"tensorflow": "2.20.0"}, False, "TensorFlow is installed"),
])
def test_conflicts(changes, broken, says):
    assert any(b == broken and says in text for b, text in found(**changes))


def test_an_old_python_is_broken():
    assert next(iter(doctor.conflicts(GOOD, (3, 10))))[0]


@pytest.mark.parametrize(("env", "broken", "says"), [
    ({"JAX_ENABLE_X64": "1"}, False, "float64"), ({"JAX_DISABLE_JIT": "true"}, True, "unset it"),
])
def test_surroundings(env, broken, says, tmp_path):
    [(b, text)] = doctor.surroundings(env, tmp_path, "Linux")
    assert b == broken and says in text


def test_small_shared_memory_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"total": 64 << 20})())
    [(broken, text)] = doctor.surroundings({}, tmp_path, "Linux")
    assert not broken and "0.06 GiB" in text
    assert list(doctor.surroundings({}, tmp_path, "Darwin")) == []


def test_it_prints_versions_devices_and_memory(capsys):
    assert main(["doctor", "--layout", "cpu-8"]) == 0
    out = capsys.readouterr().out
    assert "8 x cpu" in out and "data=2 x fsdp=2 x tensor=2" in out and "GiB free of" in out and "jax 0." in out


def test_a_mesh_that_does_not_fit_is_broken(capsys):
    assert main(["doctor", "--layout", "v5e-256"]) == 1
    assert "does not fit 8 devices" in capsys.readouterr().out


def test_a_missing_package_is_exit_code_1(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda p: None if p == "grain" else "99.0")
    assert main(["doctor"]) == 1
    assert "broken     grain is not installed" in capsys.readouterr().out


def test_memory_where_there_is_no_meminfo():
    def read() -> str:
        raise FileNotFoundError

    assert doctor.memory(read) == "unknown"
    assert doctor.memory(lambda: "MemTotal: 2097152 kB\nMemAvailable: 1048576 kB") == "1.0 GiB free of 2.0 GiB"


def test_the_lowest_versions_are_those_that_the_package_asks_for():
    setup = (Path(__file__).parents[2] / "setup.py").read_text()
    for package, lowest, _ in doctor.LOWEST:
        assert f'"{package}>={lowest}' in setup, package
