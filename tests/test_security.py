"""What SECURITY.md promises: nothing of a stranger's runs, nothing is pickled, records name nobody, only outputs are written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvlatent_cli.main import app
from on_disk import SETTINGS, snapshot, write_checkpoint, write_text

USER = "jane-q-doe"
SET = [word for setting in SETTINGS for word in ("--set", setting)]
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy"}


def run_python(arguments, place, **more):
    """A Python beside nobody's settings: home, cache and temporary files are folders of `place`."""
    folders = {"HOME": "home", "TMPDIR": "tmp", "XDG_CACHE_HOME": "cache", "HF_HOME": "hf"}
    environment = os.environ | {name: str(place / folder) for name, folder in folders.items()}
    environment |= {"USER": USER, "LOGNAME": USER, "PYTHONDONTWRITEBYTECODE": "1", **more}
    for folder in folders.values():
        (place / folder).mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, *arguments],
        check=False,
        cwd=place / "work",
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory, tiny_tokenizer):
    """A folder of that user in which commands ran, and what was seen of them."""
    place = tmp_path_factory.mktemp("security") / USER
    (place / "work").mkdir(parents=True)
    write_checkpoint(place / "inputs" / "model", tiny_tokenizer)
    text = str(write_text(place / "inputs" / "text.txt"))
    model = str(place / "inputs" / "model")
    before = snapshot(place / "inputs")
    quick = ["--blocks", "2", "--align", "1", "--set", "data.block_size=32"]
    commands = [
        ["convert", model, "--data", text, "--out", "latent", *quick],
        ["calibrate", model, "--data", text, "--out", "statistics.safetensors", *quick[:2], *quick[4:]],
        ["compress", model, "--data", text, "--out", "trained", "--tokens", "512", "--d-qk", "8", "--d-vo", "8", *SET],
        ["train", "latent", "--stage", "2", "--teacher", model, "--data", text, "--out", "further", *SET, "--tokens", "256"],
        ["export", "trained", "--to", "stock", "--out", "plain"],
        ["eval", "latent", "--against", model, "--data", text, "--checks", "perplexity", "--max-tokens", "64", "--block-size", "32"],
        ["generate", "latent", "--prompt", "the cat", "--max-new-tokens", "2"],
        ["inspect", "trained"],
    ]  # fmt: skip
    done = run_python([str(Path(__file__).with_name("audit_worker.py")), json.dumps(commands)], place)
    assert done.returncode == 0, done.stderr[-3000:]
    assert snapshot(place / "inputs") == before
    return place, json.loads(done.stdout.splitlines()[-1])


OUTPUTS = {"latent", "statistics.safetensors", "trained", "further", "plain"}


def test_only_outputs_are_written(ran):
    place, seen = ran
    assert {path.name for path in (place / "work").iterdir()} == OUTPUTS
    assert len(seen["written"]) > 20
    beside = tuple(f"{place / 'work'}/{dot}{name}" for name in OUTPUTS for dot in ("", "."))
    allowed = (
        *beside,
        f"{place / 'tmp'}/",
        f"{place / 'cache'}/kvlatent",
        f"{place / 'home'}/.cache/kvlatent",
        "/dev/",
        "/tmp/torchinductor_",  # torch's own cache of compiled code, wherever TMPDIR points
    )
    made = set(seen["written"]) - {str(place / "work")}  # which is made where it is not there
    assert [path for path in made if not path.startswith(allowed)] == []
    assert [path for path in (place / "tmp").iterdir() if not path.name.startswith("torchinductor")] == []


def test_nothing_is_connected_to(ran):
    assert ran[1]["connected"] == []


def test_no_output_is_pickled(ran):
    place, _ = ran
    files = [path for path in (place / "work").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".json"}
    assert [path for path in files if path.suffix in PICKLES] == []
    for path in files:
        assert path.read_bytes()[:2] not in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK"), path


def test_no_output_names_the_user(ran):
    place, _ = ran
    node = os.uname().nodename.encode()
    for path in (place / "work").rglob("*"):
        if path.is_file():
            held = path.read_bytes()
            assert USER.encode() not in held and str(place).encode() not in held, path
            assert len(node) < 6 or node not in held, path


@pytest.mark.parametrize("output", ["latent", "trained", "further", "plain"])
@pytest.mark.parametrize("beside", ["kvlatent", "nothing"])
def test_the_tokenizer_of_an_output_asks_for_no_code(ran, output, beside):
    """With kvlatent, or of a plain export, nothing need be said; without, transformers asks of the model's config.

    AutoTokenizer reads that config first (5.23), and it names the modelling file; so the card says trust_remote_code=False.
    """
    place, _ = ran
    start = "import kvlatent" if beside == "kvlatent" else "import sys; sys.modules['kvlatent'] = None"
    said = "" if beside == "kvlatent" or output == "plain" else ", trust_remote_code=False"
    code = f"{start}\nfrom transformers import AutoTokenizer\n"
    code += f"print(AutoTokenizer.from_pretrained({output!r}{said})('the cat').input_ids)"
    done = run_python(["-c", code], place)
    assert done.returncode == 0 and done.stdout.startswith("["), done.stderr[-2000:]
    assert "custom code" not in done.stdout + done.stderr
    assert (
        output == "plain" or "trust_remote_code=False" in (place / "work" / output / "README.md").read_text()
    )


def test_an_output_s_model_runs_its_code_only_where_asked(ran):
    place, _ = ran
    code = "import sys; sys.modules['kvlatent'] = None; from transformers import AutoModelForCausalLM as A\n"
    asked = run_python(["-c", code + "A.from_pretrained('latent', trust_remote_code=False)"], place)
    assert asked.returncode != 0
    plain = run_python(["-c", code + "A.from_pretrained('plain')"], place)
    assert plain.returncode == 0, plain.stderr[-2000:]


EVIL = "open(__file__ + '.ran', 'w').close()\nraise SystemExit('ran')\n"


def strangers_model(folder, tokenizer):
    """A checkpoint that asks transformers to run files of its own."""
    write_checkpoint(folder, tokenizer)
    (folder / "evil.py").write_text(EVIL)
    for name, classes in {
        "config.json": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
        "tokenizer_config.json": {"AutoTokenizer": ["evil.T", "evil.T"]},
    }.items():
        document = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(document | {"auto_map": classes}))
    return folder


@pytest.mark.parametrize("command", ["convert", "calibrate", "eval", "generate", "inspect"])
def test_code_in_a_checkpoint_is_not_run(tmp_path, tiny_tokenizer, command):
    model = strangers_model(tmp_path / "model", tiny_tokenizer)
    data = ["--data", str(write_text(tmp_path / "t.txt"))]
    words = {
        "convert": ["--preset", "paper", "--out", str(tmp_path / "out")],
        "calibrate": [*data, "--out", str(tmp_path / "s"), "--blocks", "2", "--set", "data.block_size=32"],
        "eval": [*data, "--checks", "perplexity", "--max-tokens", "64", "--block-size", "32"],
        "generate": ["--prompt", "the", "--max-new-tokens", "1"],
        "inspect": [],
    }[command]
    done = CliRunner().invoke(app, [command, str(model), *words])
    assert done.exit_code in (0, 2), (done.stderr, done.exception)
    assert not list(tmp_path.rglob("*.ran"))
    assert not list((tmp_path / "out").glob("evil*"))


def test_a_template_that_reaches_out_is_refused(tmp_path, tiny_tokenizer):
    model = write_checkpoint(tmp_path / "model", tiny_tokenizer)
    (model / "chat_template.jinja").write_text("{{ ().__class__.__base__.__subclasses__() }}")
    talk = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": "Yes."}]
    (tmp_path / "t.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 50)
    words = ["--data", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "s"), "--blocks", "2"]
    done = CliRunner().invoke(app, ["calibrate", str(model), *words, "--set", "data.block_size=32"])
    assert done.exit_code == 2 and "chat template refuses it" in done.stderr, done.stderr
    assert not (tmp_path / "s").exists()
