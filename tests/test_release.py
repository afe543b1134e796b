"""What a release holds and says: the look at wheel and sdist, licences, the container's commands, and the version."""

import io
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import distribution

import pytest

import kvlatent
from snippets import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import licences
import release_check

PARTS = {
    "kvlatent/__init__.py": "pass\n",
    "kvlatent_lab/__init__.py": "pass\n",
    "kvlatent_cli/__init__.py": "pass\n",
    "kvlatent/assets/stdlib-llama/config.json": "{}",
    "kvlatent-1.dist-info/METADATA": "Name: kvlatent\n",
}


def wheel(path, names):
    with zipfile.ZipFile(path, "w") as file:
        for name, text in names.items():
            file.writestr(name, text)
    return path


def test_a_wheel_is_the_packages_and_the_embedded_model(tmp_path):
    carried = release_check.check_wheel(wheel(tmp_path / "good.whl", PARTS))
    assert set(carried) == {"kvlatent", "kvlatent_lab", "kvlatent_cli", "kvlatent/assets/", "metadata"}


@pytest.mark.parametrize(
    "name", ["tests/test_x.py", "kvlatent/notes.txt", "kvlatent-1.dist-info/other", "model.pt"]
)
def test_what_a_wheel_must_not_carry_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=f"carries modules and the embedded model only: got {name}"):
        release_check.check_wheel(wheel(tmp_path / "bad.whl", {**PARTS, name: ""}))


def test_what_a_wheel_lacks_is_named(tmp_path):
    lacking = {name: text for name, text in PARTS.items() if "assets" not in name}
    with pytest.raises(ValueError, match="lacks kvlatent/assets/"):
        release_check.check_wheel(wheel(tmp_path / "bad.whl", lacking))


def test_a_wheel_has_a_size(tmp_path, monkeypatch):
    monkeypatch.setattr(release_check, "LARGEST_BYTES", 100)
    with pytest.raises(ValueError, match="at most 100 bytes: got"):
        release_check.check_wheel(wheel(tmp_path / "large.whl", PARTS))


def test_an_sdist_is_a_checkout(tmp_path):
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = listed["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert all((ROOT / name).exists() for name in listed)
    for more, match in ((["secrets.env"], r"unexpected \['secrets.env'\]"), ([], None)):
        names = [*listed, "PKG-INFO", "pyproject.toml", ".gitignore", *more]
        with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as file:
            for name in names:
                file.addfile(tarfile.TarInfo(f"kvlatent-1/{name}"), io.BytesIO())
        if match is None:
            assert release_check.check_sdist(tmp_path / "x.tar.gz") >= set(listed)
        else:
            with pytest.raises(ValueError, match=match):
                release_check.check_sdist(tmp_path / "x.tar.gz")


def test_one_file_of_a_kind_is_released(tmp_path):
    with pytest.raises(ValueError, match=r"must hold one \*.whl: got 0; empty it"):
        release_check.only_file(tmp_path, "*.whl")
    (tmp_path / "a.whl").touch()
    assert release_check.only_file(tmp_path, "*.whl").name == "a.whl"
    (tmp_path / "b.whl").touch()
    with pytest.raises(ValueError, match="got 2"):
        release_check.only_file(tmp_path, "*.whl")


def test_the_version_is_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == kvlatent.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", kvlatent.__version__)


def test_every_dependency_has_a_licence_that_may_be_used():
    packages = licences.installed_dependencies("kvlatent")
    assert {"torch", "transformers", "numpy"} <= {package.name.lower() for package in packages}
    assert [one.name for one in packages if not licences.is_usable(licences.find_licence(one))] == []


def test_licences_are_told_apart():
    for said in (
        "MIT",
        "Apache-2.0",
        "BSD-3-Clause",
        "MPL 2.0",
        "LGPLv3",
        "GNU Lesser General Public License v3",
    ):
        assert licences.is_usable(said), said
    for said in (
        "",
        "GPL-3.0",
        "GNU Affero General Public License",
        "AGPL",
        "CC-BY-NC (non-commercial)",
        "Proprietary",
    ):
        assert not licences.is_usable(said), said
    assert licences.find_licence(distribution("kvlatent")) == "Apache-2.0"


def instructions():
    """Instructions of the Dockerfile, comments away and lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [line.partition(" ")[::2] for line in text.splitlines() if line.strip()]


def test_the_container_s_instructions_are_commands_that_exist():
    """Linted, as no container engine is at hand; what RUN installs is of the index and of this project."""
    lines = instructions()
    assert lines[0][0] == "FROM"
    assert {name for name, _ in lines} <= {
        "FROM", "COPY", "RUN", "USER", "ENV", "EXPOSE", "ENTRYPOINT", "CMD",
    }  # fmt: skip
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, rest in lines:
        if name == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1]), rest
        if name == "RUN":
            program = rest.split()[0]
            assert program in ("pip", "useradd") and "http" not in rest, rest
            assert program == "useradd" or shutil.which("pip") or sys.executable
            assert set(re.findall(r"\[(\w+)\]", rest)) <= set(extras)


def test_the_container_serves_as_a_user_who_owns_nothing_else():
    lines = dict(instructions())
    assert lines["USER"] == "server"
    start = [*eval(lines["ENTRYPOINT"]), *eval(lines["CMD"])]
    assert start[:2] == ["kvlatent", "serve"]
    help_text = subprocess.run(
        [sys.executable, "-m", "kvlatent_cli", "serve", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(word in help_text for word in start if word.startswith("--"))
    constraint = (ROOT / "constraints.txt").read_text()
    assert "torch==2.13.0\n" in constraint and "torch==2.13.0" in (ROOT / "Dockerfile").read_text()
