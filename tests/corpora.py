"""Text for the data tests."""

from conftest import SENTENCES

EOS = 0
SEPARATOR = "<|endoftext|>"


def stories(count, start=0):
    """Distinct documents of a few sentences."""
    return [f"Story {n}. {SENTENCES[n % 4]} {SENTENCES[n // 4 % 4]}" for n in range(start, start + count)]


def flat(part, column="input_ids"):
    return part[:][column].flatten().tolist()
