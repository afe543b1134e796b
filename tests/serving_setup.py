"""A latent toy with a chat template, as a checkpoint that every engine takes, and requests to a server."""

import copy
import json
import urllib.error
import urllib.request

import torch

from kvlatent.checkpoints.save import save
from kvlatent.conversion.convert_model import convert
from kvlatent.selection.choices import Choices
from tiny import tiny_model

WIDTH, LAYERS, HEADS = 32, 3, 2
CONTEXT = 256
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def original_toy(tokenizer, **more):
    """Of head width 64, so that half of it is a block of llama.cpp's quantised caches; it likes to write ASCII."""
    sizes = {"vocab_size": 300, "num_key_value_heads": HEADS, "head_dim": 2 * WIDTH, "eos_token_id": 0}
    model = tiny_model("llama-mha", **{**sizes, "bos_token_id": None, "pad_token_id": None, **more})
    with torch.no_grad():
        for token in range(len(tokenizer)):
            text = tokenizer.decode([token])
            model.lm_head.weight[token] *= text.isascii() and text.isprintable()
    return model


def chatting(tokenizer):
    """The same tokenizer with a template."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def latent_directory(folder, tokenizer, d_qk=WIDTH, d_vo=WIDTH, table="model", **more):
    """A converted toy as a checkpoint."""
    latent = convert(
        original_toy(tokenizer, **more), d_qk=d_qk, d_vo=d_vo, choices=Choices(keys="weights", table=table)
    )
    latent.config._name_or_path = ""
    return save(latent, folder, tokenizer=chatting(tokenizer))


def original_directory(folder, tokenizer, **more):
    """The toy as it was."""
    original_toy(tokenizer, **more).save_pretrained(folder)
    chatting(tokenizer).save_pretrained(folder)
    return folder


def ask(url, path, **content):
    """Status and JSON of an answer; the lines of it for a stream."""
    data = json.dumps(content).encode() if content else None
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            status, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    if content.get("stream") and status == 200:
        return status, [
            line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")
        ]
    return status, json.loads(text)
