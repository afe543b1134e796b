"""Shared fixtures: tiny models and a tiny tokenizer, made here, without network or files."""

import os
from contextlib import nullcontext

os.environ["HF_HUB_OFFLINE"] = "1"
# One thread unless another number is asked for: workers would fight for the cores. Processes that tests start inherit
# it, since bits are equal only where sums are split alike.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compatibility import Recorder, Records, sentences_recorded
from rounding import Rounding

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # torch may have been imported before


def pytest_addoption(parser):
    parser.addoption(
        "--rounding", type=int, metavar="SEED", help="every kernel rounds otherwise: rounding.py"
    )
    parser.addoption(
        "--compatibility", metavar="DIR", help="keep what engine tests measured here: compatibility.py"
    )


def pytest_configure(config):
    if config.getoption("--compatibility"):
        config.pluginmanager.register(Records(config.getoption("--compatibility")), "compatibility-records")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    seed = item.config.getoption("--rounding")
    with nullcontext() if seed is None else Rounding(seed):
        return (yield)


@pytest.fixture
def compatibility(record_property, tmp_path_factory):
    """Keeps what a test measured of an engine: `compatibility.Recorder`."""
    return Recorder(record_property, tmp_path_factory.getbasetemp())


@pytest.fixture(autouse=True)
def _refusals(request):
    """A test marked `refused_by(ENGINE)` has the sentences recorded that it asks for."""
    marker = request.node.get_closest_marker("refused_by")
    if marker is None:
        yield
        return
    with sentences_recorded(request.getfixturevalue("compatibility"), *marker.args):
        yield


SENTENCES = (
    "Once upon a time there was a small cat who lived near the river and liked the sun.",
    "The dog ran over the hill, and the cat ran after the dog until both of them were tired.",
    "Every morning the old man walked to the market to buy bread, milk and a little honey.",
    "She said that the moon was bright; he said that the stars were brighter still.",
)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 tokens with an end-of-text token and no beginning-of-text token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """A random two-layer grouped-query Llama, fp32, evaluation mode, vocabulary of `tiny_tokenizer`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.2,  # large enough that attention and head matter in a comparison
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def corpus_file(tmp_path):
    """120 distinct short documents, about 11,600 tokens, in a .txt file."""
    from corpora import SEPARATOR, stories

    path = tmp_path / "corpus.txt"
    path.write_text(f"\n{SEPARATOR}\n".join(stories(120)))
    return path


@pytest.fixture
def make_corpus(tiny_tokenizer, tmp_path):
    """Call `prepare` with small blocks, and the cache in the test's own folder."""

    from kvlatent.text.corpus import prepare

    def call(source, **options):
        return prepare(
            source,
            tiny_tokenizer,
            **{"block_size": 32, "cache_dir": tmp_path / "cache", "vocab_size": 300, **options},
        )

    return call


@pytest.fixture
def gguf_original():
    """The model that `make_gguf` writes unless it is told of another."""
    from tiny import tiny_model

    return tiny_model("llama-mha", vocab_size=300, num_key_value_heads=2)


@pytest.fixture
def make_gguf(tmp_path, tiny_tokenizer, gguf_original):
    """Write a GGUF file, F32 unless another type is given, into the test's own folder."""
    from gguf_writing import F32, write_gguf

    def call(name="m.gguf", kind=F32, of=gguf_original, **more):
        return write_gguf(tmp_path / name, of, tiny_tokenizer, kind, **more)

    return call
