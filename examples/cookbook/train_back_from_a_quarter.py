"""Go down to a quarter of the cache, where a conversion alone is not enough, and train part of the way back.

Stage II imitates the original's next-token distribution. A few thousand tokens show the direction; a real run takes a million and
more (docs/train.md).
"""

from ingredients import options, ready, run


def main() -> None:
    """Convert, train, measure before and after."""
    parser = options(__doc__)
    parser.add_argument("--tokens", type=int, default=8192, help="to train on")
    parser.add_argument("--measured", type=int, default=4096, help="tokens to measure on")
    args = ready(parser)
    quarter = args.width // 2
    if not (args.folder / "quarter").is_dir():
        run(
            args,
            f"kvlatent convert {args.model} --data text.jsonl --out quarter --d-qk {quarter} --d-vo {quarter} "
            f"--blocks {args.blocks} --align {args.steps} --global-steps 0",
        )
    run(
        args,
        f"kvlatent train quarter --stage 2 --data text.jsonl --teacher {args.model} --tokens {args.tokens} "
        "--set data.block_size=256 --set stage2.batch_size=4 --out trained-quarter --overwrite",
    )
    for name in ("quarter", "trained-quarter"):
        run(
            args,
            f"kvlatent eval {name} --against {args.model} --data held_out.jsonl --checks perplexity "
            f"--block-size 256 --max-tokens {args.measured}",
        )


if __name__ == "__main__":
    main()
