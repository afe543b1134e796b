"""Every server answers clients of OpenAI alike, says what its cache takes, and refuses in a sentence what it cannot do."""

import json
import signal
import socket
import subprocess
import sys

import pytest
import torch
from openai import BadRequestError, OpenAI

from kvlatent.checkpoints.load import load_model
from kvlatent.engines import llama_cpp_server, vllm_server
from kvlatent.engines.engine_process import EngineProcess, EngineSettings
from kvlatent.workflows import engine_choice
from kvlatent.workflows.engine_choice import RUNNERS, Runnable, choose_runnable
from kvlatent.workflows.export_checkpoint import EXPORT_RECORD
from kvlatent.workflows.serve_checkpoint import start_server
from serving_setup import CONTEXT, HEADS, LAYERS, WIDTH, ask, latent_directory, original_directory

PROMPT = "Once upon a time there was"
NUMBERS = LAYERS * HEADS * 2 * WIDTH  # cached for a token


@pytest.fixture(scope="module")
def latent(tmp_path_factory, tiny_tokenizer):
    return latent_directory(tmp_path_factory.mktemp("serve") / "toy", tiny_tokenizer)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where exports go, once for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(
    ("engine", "kv_dtype", "bytes_a_number"),
    [("llama.cpp", "f32", 4), ("openvino", "f32", 4), ("transformers", None, 4)],
)
def test_the_contract(engine, kv_dtype, bytes_a_number, latent, cache, tiny_tokenizer):
    process, said = start_server(latent, engine=engine, kv_dtype=kv_dtype, port=0, cache=cache)
    with process:
        url = said["url"]
        assert said["model"] == "toy" and said["context"] == CONTEXT
        # llama.cpp says hundredths of a MiB of the whole cache.
        assert said["cache_bytes_per_token"] == pytest.approx(NUMBERS * bytes_a_number, rel=0.02)
        assert "toy" in [one["id"] for one in ask(url, "/v1/models")[1]["data"]]
        _check_completions(engine, url, latent, tiny_tokenizer)
        _check_chat(url)
        _check_refusals(url)
        _check_client(url)
    with pytest.raises(OSError):
        ask(url, "/v1/models")


def _check_completions(engine, url, latent, tokenizer):
    greedy = {"model": "toy", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    status, answer = ask(url, "/v1/completions", **greedy)
    assert status == 200 and answer["object"] == "text_completion"
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    model = load_model(latent)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids))
    text = tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer["choices"][0]["text"] == text
    assert answer["usage"]["prompt_tokens"] == ids.shape[1]
    if engine != "llama.cpp":  # whose server is its own
        least = ask(url, "/v1/completions", **{**greedy, "temperature": 1e-40})[1]
        assert least["choices"][0]["text"] == text  # float32 has no logits over that
    status, lines = ask(url, "/v1/completions", **greedy, stream=True)
    assert status == 200 and lines[-1] == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == text


def _check_chat(url):
    chat = {"model": "toy", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 6}
    status, answer = ask(url, "/v1/chat/completions", **chat, temperature=0)
    message = answer["choices"][0]["message"]
    assert status == 200 and message["role"] == "assistant" and message["content"]
    status, lines = ask(url, "/v1/chat/completions", **chat, temperature=0, stream=True)
    deltas = [json.loads(line)["choices"] for line in lines[:-1]]
    said = "".join(one[0]["delta"].get("content") or "" for one in deltas if one)
    assert lines[-1] == "[DONE]" and said == message["content"]
    sampled = {
        ask(url, "/v1/chat/completions", **chat, temperature=2.0, seed=seed)[1]["choices"][0]["message"][
            "content"
        ]
        for seed in range(3)
    }
    assert len(sampled) > 1


def _check_refusals(url):
    for stream in (False, True):
        status, answer = ask(url, "/v1/completions", model="toy", prompt=PROMPT * 100, stream=stream)
        assert status == 400 and str(CONTEXT) in answer["error"]["message"], answer
    status, answer = ask(url, "/v1/chat/completions", model="toy", max_tokens=4)
    assert 400 <= status <= 500 and "messages" in answer["error"]["message"]
    status, answer = ask(url, "/v1/chat/completions", model="toy", max_tokens=4, messages="hello")
    assert status == 400 and "messages" in answer["error"]["message"]
    status, answer = ask(url, "/v1/completions", model="toy", prompt=PROMPT, max_tokens=100 * CONTEXT)
    usage = answer["usage"]  # as far as the context goes
    assert status == 200 and usage["prompt_tokens"] + usage["completion_tokens"] <= CONTEXT


def _check_client(url):
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        messages = [{"role": "user", "content": PROMPT}]
        asked = {"model": "toy", "messages": messages, "max_tokens": 4, "temperature": 0}
        chat = client.chat.completions.create(**asked)
        parts = client.chat.completions.create(**asked, stream=True)
        streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        assert streamed == chat.choices[0].message.content != ""
        with pytest.raises(BadRequestError, match=str(CONTEXT)):
            client.completions.create(model="toy", prompt=PROMPT * 100)


def test_the_command_serves_until_it_is_ended(latent):
    words = ["serve", latent, "--engine", "transformers", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "kvlatent_cli", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        lines = []
        while not lines or "ready:" not in lines[-1]:
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr.read()
        url = lines[-1].split()[1].removesuffix("/v1")
        assert f"{NUMBERS * 4:,} bytes a token" in "".join(lines)
        assert ask(url, "/v1/models")[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, process.stderr.read()
        with pytest.raises(OSError):
            ask(url, "/v1/models")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.refused_by("kvlatent serve")
def test_a_taken_port_is_refused_before_any_work(latent, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=f"cannot listen on port {port} of 127.0.0.1 .*give another --port"
        ):
            start_server(latent, port=port, cache=tmp_path)
    with pytest.raises(ValueError, match="a port is 0 .any. to 65535: got 70000; try --port 8000"):
        start_server(latent, port=70000, cache=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", RUNNERS)
@pytest.mark.refused_by("kvlatent serve")
def test_an_engine_that_is_not_installed_says_how_to_install_it(engine, latent, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_choice, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"engine {engine} needs .* not installed; pip install "):
        start_server(latent, engine=engine, port=0, cache=tmp_path)


def test_an_unknown_engine_lists_the_known(latent, tmp_path):
    with pytest.raises(ValueError, match="'mlx' cannot be started from here; choose one of vllm, llama.cpp"):
        start_server(latent, engine="mlx", port=0, cache=tmp_path)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kv_dtype": "q9_0"}, "engine llama.cpp on cpu has no KV dtype 'q9_0'; .*choose one of f16"),
        ({"context": 1}, "a context is 2 to 256 tokens, as toy was made for: got 1; try --context 256"),
        ({"context": 10_000}, "a context is 2 to 256 tokens, .*: got 10,000; try --context 256"),
    ],
)
@pytest.mark.refused_by("kvlatent serve")
def test_settings_that_the_engine_does_not_take(options, sentence, latent, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        start_server(latent, engine="llama.cpp", port=0, cache=tmp_path, **options)
    assert not list(tmp_path.iterdir())  # refused before an export, which can take minutes


@pytest.mark.refused_by("kvlatent serve")
def test_a_width_that_a_type_does_not_take():
    runnable = Runnable(RUNNERS["llama.cpp"], "m.gguf", "toy", False, CONTEXT, (48,), (48,))
    assert runnable.check_kv_dtype("f16") == "f16" and runnable.check_kv_dtype(None) is None
    with pytest.raises(
        ValueError, match="takes multiples of its block of 32 in q4_0: got d_qk=48; try 32 or 64"
    ):
        runnable.check_kv_dtype("q4_0")


@pytest.mark.refused_by("kvlatent serve")
def test_our_own_runtime_has_one_type_of_cache(latent, tmp_path):
    with pytest.raises(ValueError, match="in the model's own dtype: got --kv-dtype fp8; leave it out"):
        start_server(latent, engine="transformers", kv_dtype="fp8", port=0, cache=tmp_path)


def test_what_comes_first_is_passed_over_with_its_reason(tmp_path, tiny_tokenizer, monkeypatch):
    """Tables of every head's own go to no GGUF file."""
    monkeypatch.setattr(
        engine_choice, "find_spec", lambda name: None if "openvino" in name or name == "vllm" else name
    )
    heads = latent_directory(tmp_path / "heads", tiny_tokenizer, table="head")
    runnable = choose_runnable(heads, None, tmp_path / "cache")
    assert runnable.runner.name == "transformers" and runnable.path == str(heads)
    first, second = (note for note in runnable.notes if "openvino" not in note)
    assert "engine vllm needs vllm" in first and "rotary" in second
    with pytest.raises(ValueError, match="one set of 16 rotary frequencies"):
        choose_runnable(heads, "llama.cpp", tmp_path / "cache")


def test_an_export_is_made_once(latent, cache, monkeypatch):
    first = choose_runnable(latent, "llama.cpp", cache)
    assert first.was_exported and first.path.endswith(".gguf")
    monkeypatch.setattr(engine_choice, "export", None)
    again = choose_runnable(latent, "llama.cpp", cache)
    assert again.path == first.path
    file = choose_runnable(first.path, None, cache)
    assert file.runner.name == "llama.cpp" and not file.was_exported and file.context == CONTEXT
    with pytest.raises(ValueError, match="is run by llama.cpp as it is: got --dtype q8_0, .*leave it out"):
        choose_runnable(first.path, None, cache, dtype="q8_0")


@pytest.mark.refused_by("kvlatent serve")
def test_what_an_engine_does_not_load_is_refused(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(engine_choice, "find_spec", lambda name: name)
    (original_directory(tmp_path / "stock", tiny_tokenizer) / EXPORT_RECORD).write_text("{}")
    with pytest.raises(
        ValueError,
        match="llama.cpp does not load a plain checkpoint .*--engine vllm or transformers, or .*--to gguf",
    ):
        choose_runnable(tmp_path / "stock", "llama.cpp", tmp_path / "cache")
    assert choose_runnable(tmp_path / "stock", None, tmp_path / "cache").runner.name == "vllm"
    (tmp_path / "files").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "files" / name).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="holds 2 GGUF files and one is run: name it, e.g. .*a.gguf"):
        choose_runnable(tmp_path / "files", None, tmp_path / "cache")
    with pytest.raises(ValueError, match="is no GGUF file of a model"):
        choose_runnable(tmp_path / "files" / "a.gguf", None, tmp_path / "cache")
    with pytest.raises(ValueError, match="vllm does not load a GGUF file"):
        choose_runnable(tmp_path / "files" / "a.gguf", "vllm", tmp_path / "cache")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="of files a GGUF file .* is run"):
        choose_runnable(tmp_path / "notes.txt", None, tmp_path / "cache")


def test_an_engine_that_fails_at_start_says_why_and_is_gone(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(64))
    settings = EngineSettings(str(tmp_path / "broken.gguf"), "broken", 64)
    with pytest.raises(ValueError, match="llama.cpp does not load it: .+"):
        EngineProcess("llama_cpp_server", "serve", settings)


def test_llama_cpp_keeps_no_caches_of_earlier_prompts(monkeypatch):
    """By default up to 8 GiB beside the cache that it tells of: half an hour of mixed requests took a quarter more."""
    xllamacpp = pytest.importorskip("xllamacpp")
    given = []

    class Server:
        def __init__(self, params):
            given.append(params)
            raise RuntimeError("seen enough")

    monkeypatch.setattr(xllamacpp, "Server", Server)
    with pytest.raises(ValueError, match="llama.cpp does not load it"):
        llama_cpp_server.serve(EngineSettings("toy.gguf", "toy", 64))
    assert xllamacpp.CommonParams().cache_ram_mib > 0 == given[0].cache_ram_mib


def test_vllm_is_told_what_was_asked_and_its_words_are_read():
    settings = EngineSettings("DIR", "toy", 4096, "fp8", port=8123)
    words = vllm_server.serve_command(settings)[4:]
    assert words[:2] == ["serve", "DIR"]
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert options == {
        "--served-model-name": "toy",
        "--host": "127.0.0.1",
        "--port": "8123",
        "--max-model-len": "4096",
        "--kv-cache-dtype": "fp8",
    }
    tokens = "INFO GPU KV cache size: 16,384 tokens, Maximum concurrency for 4,096 tokens per request: 4.00x"
    for memory in (
        "Available KV cache memory: 2.0 GiB",
        "Explicitly set (2.0/23.4) GiB for KV cache on node 0.",
    ):
        facts = vllm_server.cache_facts(f"INFO {memory}\n{tokens}\n", settings)
        assert facts["cache_bytes_per_token"] == 2**31 / 16384 and facts["cache_dtype"] == "fp8"
    assert vllm_server.cache_facts("", settings)["cache_bytes_per_token"] is None


def test_vllm_is_waited_for_and_ended(monkeypatch, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "health").write_text("")
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "-d", str(tmp_path)]
    monkeypatch.setattr(vllm_server, "serve_command", lambda settings: command)
    facts, stop = vllm_server.serve(EngineSettings("DIR", "toy", 64, port=port))
    assert facts["url"] == f"http://127.0.0.1:{port}"
    stop()
    with pytest.raises(OSError):
        ask(facts["url"], "/health")
    monkeypatch.setattr(
        vllm_server, "serve_command", lambda settings: [sys.executable, "-c", "raise ValueError('no')"]
    )
    with pytest.raises(ValueError, match="vLLM does not serve it: ValueError: no"):
        vllm_server.serve(EngineSettings("DIR", "toy", 64, port=port))
