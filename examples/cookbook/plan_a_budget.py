"""Choose widths for a budget, before anything is converted.

One calibration serves every plan. A share of the cache is one question, so many bytes for so many tokens on an engine another.
"""

from ingredients import options, ready, run


def main() -> None:
    """Calibrate once, plan twice."""
    parser = options(__doc__)
    parser.add_argument("--context", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--bytes", default="12MiB", help="for its cache")
    args = ready(parser)
    if not (args.folder / "statistics.safetensors").is_file():
        run(
            args,
            f"kvlatent calibrate {args.model} --data text.jsonl --out statistics.safetensors --blocks {args.blocks}",
        )
    run(args, f"kvlatent plan {args.model} --statistics statistics.safetensors --kv 0.5")
    run(
        args,
        f"kvlatent plan {args.model} --kv-bytes {args.bytes} --context {args.context} --engine llama.cpp",
    )


if __name__ == "__main__":
    main()
