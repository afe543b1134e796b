"""Every command and code block of the documentation runs, page by page, beside the files that its pages speak of.

`MODEL`, `smaller`, `text.jsonl` and `held_out.txt` are a toy of that name and its text. What the test adds to a command are
fewer steps and shorter blocks (`FEWER`), where the page leaves them out; the words of the page stay as they are.
"""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tomllib

import pytest
import typer
from typer.testing import CliRunner

from kvlatent.checkpoints.save import save
from kvlatent.conversion.convert_model import convert
from kvlatent.jobs.recipe import Recipe
from kvlatent_cli.main import app
from on_disk import WORDS
from serving_setup import chatting, original_directory, original_toy
from snippets import PAGES, ROOT, snippets_of

FEWER = {"--blocks": "2", "--align": "1", "--global-steps": "1"}
SMALL = ("data.block_size=64", "lora.rank=2", "stage1.batch_size=2", "stage2.batch_size=2")
CHECKED = {"text", "math", ""}  # math by the site's build; no language: README alone
COMMANDS = typer.main.get_command(app).commands
PROGRAMS = {"docker", "llama-server", "make", "mlx_lm.generate", "pip", "python", "torchrun"}
RUN = [page for page in PAGES if any(one.language in ("bash", "python", "yaml") for one in snippets_of(page))]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer):
    """What pages speak of: an original, one that is converted, and texts."""
    folder = tmp_path_factory.mktemp("pages")
    sizes = {"max_position_embeddings": 1024, "num_hidden_layers": 2, "num_attention_heads": 2}
    original_directory(folder / "MODEL", tiny_tokenizer, **sizes)
    latent = convert(original_toy(tiny_tokenizer, **sizes), d_qk=32, d_vo=32, preset="own-frequency")
    save(latent, folder / "smaller", tokenizer=chatting(tiny_tokenizer))
    texts = [" ".join(WORDS[n % 40 : n % 40 + 20]) + f" {n}." for n in range(120)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "held_out.txt").write_text("<|endoftext|>".join(texts[:40]))
    return folder


def words_of(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def options_of(command: str) -> set[str]:
    return {flag for parameter in COMMANDS[command].params for flag in parameter.opts}


def with_fewer_steps(words: list[str]) -> list[str]:
    """A command of the page and what makes it short; nothing that contradicts what the page says."""
    has = options_of(words[0])
    if "--minutes" in words:  # a page may speak of hours
        return [*words, "--dry-run"]
    fixed = "--statistics" in words or "--kv-bytes" in words or "--dry-run" in words
    more = (
        [] if fixed else [word for flag in FEWER if flag in has - set(words) for word in (flag, FEWER[flag])]
    )
    if words[0] == "train" or ("--set" in has and "--kv-bytes" not in words):
        more += [word for setting in SMALL for word in ("--set", setting)]
    if words[0] == "eval" and "--checks" not in words:
        more += ["--contexts", "64"]
    return words + more


def check_words(words: list[str]) -> None:
    """A command that is not run: its program is known, and the command line takes its words."""
    program, *rest = words
    program = program.removeprefix("vllm-env/bin/")
    if program == "kvlatent":
        COMMANDS[rest[0]].make_context(rest[0], rest[1:])
    elif program == "vllm":
        assert rest[:1] == ["serve"]
    else:
        assert program in PROGRAMS, f"no program that the documentation knows: {program}"
    if program == "make":
        targets = (ROOT / "Makefile").read_text()
        assert all(f"\n{target}:" in targets for target in rest if not target.startswith("-"))
    for wanted in rest if program == "pip" else ():
        name, _, extra = wanted.partition("[")
        if name == "kvlatent" and extra:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set(extra.removesuffix("]").split(",")) <= set(extras)


def run_line(line: str) -> None:
    words = words_of(line)
    if words[0] != "kvlatent":
        return check_words(words)
    done = CliRunner().invoke(app, with_fewer_steps(words[1:]))
    assert done.exit_code == 0, f"{line}\n{done.stdout}\n{done.stderr}\n{done.exception!r}"


class Server:
    """`kvlatent serve` of a page, in a process of its own."""

    def __init__(self, line: str) -> None:
        words = words_of(line)
        assert words[:2] == ["kvlatent", "serve"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvlatent_cli", *words[1:]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        said = []
        for out in self.process.stdout:
            said.append(out)
            if out.startswith("ready"):
                return
        self.end()
        raise AssertionError("".join(said))

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
        try:
            self.process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_page(page) -> None:
    """All blocks of a page, in order; python blocks share their names."""
    names, server, port = {}, None, free_port()
    try:
        for block in snippets_of(page):
            text = block.text.replace("8000", port)
            if block.mark == "serves":
                if server is not None:
                    server.end()
                (line,) = block.lines
                server = Server(line.replace("8000", port))
            elif block.mark == "not run":
                assert block.why
                for line in block.lines:
                    check_words(words_of(line))
            elif block.language == "python":
                exec(compile(text, str(page), "exec"), names)  # noqa: S102 - what the page shows
            elif block.language == "yaml":
                with open("page.yaml", "w") as file:
                    file.write(text)
                Recipe.load("page.yaml")
            elif block.language == "bash":
                if server is not None:
                    server = server.end()
                for line in block.lines:
                    run_line(line)
    finally:
        if server is not None:
            server.end()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # random toys: conversions warn of what they lose
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of libraries that pages import themselves
@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_the_page_runs(page, place, tmp_path, monkeypatch):
    made = {
        out
        for block in snippets_of(page)
        if block.language == "bash"
        for out in re.findall(r"--out (\S+)", block.text)
    }
    for part in place.iterdir():
        if part.name not in made:
            os.symlink(part, tmp_path / part.name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # of exports that are served
    run_page(page)


def test_every_block_says_what_it_is():
    for page in PAGES:
        for block in snippets_of(page):
            known = {"bash", "python", "yaml", *CHECKED} - ({""} if page.name != "README.md" else set())
            assert block.language in known, f"{page.name}: {block.text}"


def test_wrong_words_are_seen():
    with pytest.raises(Exception, match="No such option"):
        check_words(words_of("kvlatent convert MODEL --out smaller --narrower 2"))
    with pytest.raises(AssertionError, match="no program"):
        check_words(words_of("kvlatnet convert MODEL"))
    with pytest.raises(AssertionError):
        check_words(words_of("make nonsense"))
