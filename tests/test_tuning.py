"""Fine-tuning of latent models with other people's trainers: the examples, end to end, and what adapters do in each family."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.self_check import SELF_CHECK, SelfCheck
from kvlatent.conversion.convert_model import convert
from kvlatent_cli.main import app
from on_disk import WORDS, write_text
from serving_setup import chatting, latent_directory, original_directory
from tiny import FAMILIES, MORE_FAMILIES, tiny_model, tokens

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2}
COMMON = ("--max_steps", "2", "--per_device_train_batch_size", "2", "--learning_rate", "0.01")
COMMON += ("--report_to", "none", "--save_steps", "1", "--disable_tqdm", "true")
RUNS = {
    "sft": ("chats", ()),
    "dpo": ("pairs", ()),
    "grpo": ("questions", ("--num_generations", "2", "--max_completion_length", "6")),
    "lora": ("chats", ("--rank", "2")),
}
# TRL still asks transformers by the old names of activation checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")


def write_data(folder):
    """Chats, preferences and questions of a few words."""
    asked = [[{"role": "user", "content": " ".join(WORDS[n : n + 3])}] for n in range(8)]
    said = [[{"role": "assistant", "content": WORDS[n + 3]}] for n in range(8)]
    rows = {
        "chats": [{"messages": [*one, *two]} for one, two in zip(asked, said, strict=True)],
        "pairs": [
            {"prompt": one, "chosen": two, "rejected": [{"role": "assistant", "content": "no"}]}
            for one, two in zip(asked, said, strict=True)
        ],
        "questions": [{"prompt": one, "answer": "e"} for one in asked],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer):
    """An original, its latent model, data, and what every example made of them."""
    folder = tmp_path_factory.mktemp("tuning")
    original_directory(folder / "MODEL", tiny_tokenizer, **SIZES)
    latent_directory(folder / "smaller", tiny_tokenizer, **SIZES)
    write_data(folder)
    write_text(folder / "text.txt", documents=20)
    return folder


@pytest.fixture(scope="module")
def tuned(place):
    """Run one example, once; the directory that it made."""

    def run(name):
        out = place / name
        if not out.is_dir():
            data, more = RUNS[name]
            words = ["--model", place / "smaller", "--data", place / f"{data}.jsonl", "--out", out]
            words += ["--output_dir", place / f"{name}-work", *COMMON, *more]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
                runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return out

    return run


@pytest.mark.parametrize("name", RUNS)
def test_what_was_trained_is_a_latent_checkpoint_as_before(tuned, place, name):
    out = tuned(name)
    before, after = load_model(place / "smaller"), load_model(out)
    names = dict(before.named_parameters())
    changed = {key for key, value in after.named_parameters() if not torch.equal(value, names[key])}
    assert set(dict(after.named_parameters())) == set(names)
    assert any("self_attn" in key for key in changed)
    assert any("mlp" in key for key in changed)
    assert after.config.kv_latent == before.config.kv_latent
    assert after.config.use_cache, "training turned the cache off"
    files = {file.name for file in (place / "smaller").iterdir()}
    assert {file.name for file in out.iterdir()} == files
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / file).read_bytes() == (place / "smaller" / file).read_bytes()


def test_a_fresh_process_without_us_says_what_the_trained_model_said(tuned):
    """The self-check was taken from the model that was trained, in memory."""
    folders = [tuned(name) for name in RUNS]
    code = (
        "import json, sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        "for folder in sys.argv[1:]:\n"
        "    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        f"    ids = json.load(open(folder + '/{SELF_CHECK}'))['input_ids']\n"
        "    print(json.dumps(model(torch.tensor([ids])).logits[0].tolist()))\n"
        "assert 'kvlatent' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, folders)], capture_output=True, text=True, check=True
    )
    checks = [SelfCheck.from_dict(json.loads((folder / SELF_CHECK).read_text())) for folder in folders]
    for check, line in zip(checks, done.stdout.splitlines(), strict=True):
        assert check.difference(torch.tensor(json.loads(line))) < 1e-4
    assert checks[0].difference(torch.tensor(json.loads(done.stdout.splitlines()[1]))) > 1e-2


@pytest.mark.parametrize("name", ["grpo", "lora"])
def test_eval_and_export_take_it(tuned, place, name, tmp_path):
    out = tuned(name)
    words = [
        "eval",
        out,
        "--against",
        place / "MODEL",
        "--data",
        place / "text.txt",
        "--checks",
        "perplexity",
    ]
    words += ["--block-size", "32", "--max-tokens", "256"]
    export = ["export", out, "--to", "stock", "--out", tmp_path / "stock"]
    for command in (words, export):
        done = CliRunner().invoke(app, list(map(str, command)))
        assert done.exit_code == 0, done.stderr
    assert (tmp_path / "stock" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_a_checkpoint_of_the_trainer_is_one_of_ours(tuned, place, name):
    """`save_pretrained` as a trainer calls it, in the middle of a run."""
    tuned(name)
    halfway = place / f"{name}-work" / "checkpoint-1"
    last = load_model(place / f"{name}-work" / "checkpoint-2")
    assert (halfway / "modeling_kv_latent.py").is_file()
    assert load_model(halfway).config.kv_latent == last.config.kv_latent
    assert last.config.use_cache
    assert all(map(torch.equal, last.parameters(), load_model(place / name).parameters()))


@pytest.mark.parametrize(
    "name", [*FAMILIES, *(pytest.param(n, marks=pytest.mark.nightly) for n in MORE_FAMILIES)]
)
def test_adapters_find_narrow_projections_and_merge(name):
    """peft's own `all-linear`, in every family: what the merged model says is what the adapted one said."""
    latent = convert(tiny_model(name), d_qk=16, d_vo=16, preset="own-frequency")
    before = set(latent.state_dict())
    x = tokens(length=12)
    with torch.no_grad():
        plain = latent(x).logits
    model = get_peft_model(latent, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted = {path for path, module in model.named_modules() if hasattr(module, "lora_A")}
    assert any("attn" in path or "attention" in path for path in adapted)
    torch.manual_seed(1)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_B" in path:
                parameter.normal_(std=0.05)
    model.train()
    model(x, labels=x).loss.backward()
    learns = [
        p.grad is not None
        for name, p in model.named_parameters()
        if "lora_" in name and ("attn" in name or "attention" in name)
    ]
    assert learns and all(learns)  # an expert that no token went to has nothing to learn
    model.eval()
    with torch.no_grad():
        wanted = model(x).logits
        merged = model.merge_and_unload()
        found = merged(x).logits
    assert set(merged.state_dict()) == before
    scale = wanted.abs().max()
    assert (found - wanted).abs().max() < 1e-4 * scale
    assert (plain - wanted).abs().max() > 1e-3 * scale


def test_a_chat_tokenizer_is_given_back_as_it_was(tuned, place, tiny_tokenizer):
    """GRPO pads on the left; what is saved pads as the model's tokenizer did."""
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(tuned("grpo"))
    assert saved.padding_side == chatting(tiny_tokenizer).padding_side
    assert saved.chat_template == chatting(tiny_tokenizer).chat_template
