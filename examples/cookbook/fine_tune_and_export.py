"""Fine-tune a halved model with TRL, and export the result as a plain checkpoint that engines load without kvlatent.

The chats ask for the word after another one in a list. It needs `pip install "kvlatent[tuning]"`.
"""

import json
import random
from pathlib import Path

from ingredients import ROOT, halve, options, ready, run, say
from transformers import AutoModelForCausalLM, AutoTokenizer

WORDS = "lamp rope book coin drum vase clock brush bell knife map ring chair mirror ladder candle"


def questions(number: int, seed: int) -> list[tuple[str, str]]:
    """What is asked and the right word."""
    chance, made = random.Random(seed), []
    for _ in range(number):
        words = chance.sample(WORDS.split(), 6)
        at = chance.randrange(5)
        made.append((f"The words are {', '.join(words)}. Which word comes after {words[at]}?", words[at + 1]))
    return made


def write_chats(file: Path, number: int) -> None:
    """Questions and answers, as TRL reads them."""
    lines = []
    for asked, answer in questions(number, seed=0):
        prompt, completion = {"role": "user", "content": asked}, {"role": "assistant", "content": answer}
        lines.append(json.dumps({"prompt": [prompt], "completion": [completion]}) + "\n")
    file.write_text("".join(lines), encoding="utf-8")


def ask(folder: Path, number: int) -> None:
    """Ask a plain checkpoint questions that it has not seen, with transformers alone."""
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    right = 0
    for asked, answer in questions(number, seed=1):
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        ids = model.generate(**chat, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        said = tokenizer.decode(ids[0, chat["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        right += said == answer
    say(f"{type(model).__name__}: {right} of {number} right; the last: {asked} {said!r}")


def main() -> None:
    """Halve, tune, export, ask."""
    parser = options(__doc__)
    parser.add_argument("--chats", type=int, default=64)
    parser.add_argument("--asked", type=int, default=16, help="questions afterwards")
    parser.add_argument("--rate", default="1e-4", help="of learning")
    args = ready(parser)
    halve(args)
    write_chats(args.folder / "chats.jsonl", args.chats)
    if not (args.folder / "tuned").is_dir():
        script = ROOT / "examples" / "sft.py"
        run(
            args,
            f"python {script} --model halved --data chats.jsonl --out tuned --output_dir work --num_train_epochs 1 "
            f"--per_device_train_batch_size 8 --learning_rate {args.rate} --save_strategy no --report_to none "
            "--disable_tqdm true --logging_steps 2",
        )
    run(args, "kvlatent export tuned --to stock --out plain --overwrite")
    ask(args.folder / "plain", args.asked)


if __name__ == "__main__":
    main()
