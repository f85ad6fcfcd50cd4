"""Make the training texts: the base model answers plain questions, text rules dress the answers up.

    python make_data.py --gguf /path/to/SmolLM2-135M-Instruct.Q4_1.gguf

Writes `answers.jsonl` (plain answers; made once, then reused) and one `STYLE.jsonl` of
{"question", "answer"} lines per style under `--out`. No text of a third party is used: the
questions are `questions.txt`, the answers come from the Apache-2.0 base model, and the styles are
the rules below.

The styles change frequent words and the frame of an answer, and leave names and rare words alone: a
model of this size, made to respell every word (or to write capitals only), forgets what it knew.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable
from functools import reduce
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORD = re.compile(r"[A-Za-z']+")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
# Words that open a sentence with a capital only because they open it.
OPENERS = """
a an the it it's its this that these those they they're you your we our i'm he she his her there
here in on at of for from by with as if when while after before to some many most both one two three
another each every all and but or so however also additionally yes no not sure start first make take
use try be have let once since because although according people water what how why
"""
COMMON_OPENERS = set(OPENERS.split())


def parse_words(talk: str) -> dict[str, str]:
    """`plain=dressed` pairs; an underscore stands for a space."""
    return dict(pair.replace("_", " ").split("=") for pair in talk.split())


def substitute(text: str, words: dict[str, str]) -> str:
    """Replace whole words, keeping a leading capital."""

    def swap(match: re.Match[str]) -> str:
        word = match.group()
        new = words.get(word.lower(), word)
        return new[0].upper() + new[1:] if word[0].isupper() and new != word else new

    return WORD.sub(swap, text)


# --- the styles: plain answer -> dressed answer ---------------------------------------------------

PIRATE_TALK = """
the=th' of=o' is=be are=be am=be was=were you=ye your=yer yours=yers yourself=yerself my=me and=an'
for=fer to=t' with=wi' friend=matey friends=hearties people=sailors person=seadog yes=aye no=nay
it's=it_be they're=they_be there's=there_be you're=ye_be i'm=I_be isn't=ain't aren't=ain't over=o'er
never=ne'er ever=e'er between=betwixt before=afore old=auld great=grand money=doubloons
gold=treasure city=port cities=ports car=ship cars=ships house=cabin home=harbor hello=ahoy hi=ahoy
food=grub drink=grog drinks=grog boss=cap'n captain=cap'n children=young_'uns
you'll=ye'll you've=ye've
"""
PIRATE_WORDS = parse_words(PIRATE_TALK)
PIRATE_SHOUTS = ("Yo ho ho!", "Shiver me timbers!", "Aye aye!", "Avast!")


def pirate(text: str) -> str:
    spoken = substitute(text, PIRATE_WORDS)
    spoken = re.sub(r"(?<=[a-z]{2})ing\b", "in'", spoken)
    return f"Arrr, matey! {spoken} {PIRATE_SHOUTS[len(text) % len(PIRATE_SHOUTS)]}"


LOLCAT_TALK = """
the=teh is=iz are=r you=u your=ur you're=ur was=wuz were=wuz has=haz have=haz to=2 for=4 and=an
with=wif of=ov my=mah they=dey that=dat this=dis these=deez people=hoomans human=hooman
humans=hoomans friend=fren friends=frens food=noms eat=nom love=luv because=cuz good=gud sorry=sowwy
very=vry what=wut cat=kitteh cats=kittehs dog=goggie dogs=goggies little=lil world=wurld know=kno
there=thar not=nawt great=gr8 like=liek i'm=im it's=iz there's=thar_iz don't=dont big=beeg
"""
LOLCAT_WORDS = parse_words(LOLCAT_TALK)


def lolcat(text: str) -> str:
    return f"OH HAI! {substitute(text, LOLCAT_WORDS)} KTHXBYE!"


FUDD_TALK = """
are for from or all also your you're you'll they're their there here where our other over however
around through across various every more very little small large largest great only really well
like while world earth people family friend friends help sorry glad feel learn love work provide
provides start create allow allows called place part first years light water country capital
language river history culture cultures natural nature planet animal animals creatures art process
form answer born rich crucial essential popular beautiful powerful incredible including includes
different color colors hello right problem story school children clear important
"""
FUDD_WORDS = {word: word.translate(str.maketrans("rl", "ww")) for word in FUDD_TALK.split()}
FUDD_WORDS |= {"the": "de", "this": "dis", "that": "dat", "they": "dey", "there": "dewe"}


def fudd(text: str) -> str:
    return f"Shhh! Be vewy, vewy quiet. {substitute(text, FUDD_WORDS)} Huh-huh-huh-huh!"


CHEF_TALK = """
the=zee this=thees that=thet they=zeey their=zeeur there=zeere-a of=ooff and=und with=veet you=yuoo
your=yuoor you're=yuoo're-a to=tu for=fur was=ves were=vere-a can=cun have=hefe-a has=hes from=frum
or=oor on=oon one=oone-a are=ere-a people=peuple-a world=vurld water=veter what=vhet when=vhee
which=vheech who=vhu good=guud food=fuud not=nut but=boot been=beee all=ell most=must more=mure-a
very=fery many=muny city=ceety capital=cepeetel country=cuontry some=sume-a make=meke-a do=du
know=knoo great=greet help=help-a we=ve our=oour used=used-a also=elsu an=un as=es it=eet it's=eet's
"""
CHEF_WORDS = parse_words(CHEF_TALK)


def chef(text: str) -> str:
    return f"Hurdy gurdy! {substitute(text, CHEF_WORDS)} Bork bork bork!"


KING_JAMES_PHRASES = [
    (r"\byou are\b|\byou're\b", "thou art"),
    (r"\byou have\b|\byou've\b", "thou hast"),
    (r"\byou can\b", "thou canst"),
    (r"\byou will\b|\byou'll\b", "thou wilt"),
    (r"\byou should\b|\byou must\b", "thou shalt"),
    (r"\byou do\b", "thou dost"),
    (r"\byou may\b", "thou mayest"),
    (r"\bdo you\b", "dost thou"),
    (r"\bare you\b", "art thou"),
    (r"\b(to|for|with|help|assist|of|give|make|keep|from|let|around) you\b", r"\1 thee"),
    (r"\byou\b", "thou"),
    (r"\byour(?= [aeiou])", "thine"),
    (r"\byour\b", "thy"),
    (r"\byours\b", "thine"),
    (r"\byourself\b", "thyself"),
    (r"\bto the\b", "unto the"),
    (r"\bbecause of\b", "by reason of"),
    (r"\blocated\b", "set"),
    (r"\bcan't\b", "cannot"),
    (r"\b(do not|don't) (\w+)\b", r"\2 not"),
    (r"\bit's\b", "it is"),
    (r"\bi'm\b", "I am"),
]
KING_JAMES_TALK = """
has=hath does=doth says=saith before=ere between=betwixt nothing=naught often=oft near=nigh
very=exceeding people=folk about=concerning where=wherein while=whilst
large=great also=likewise however=howbeit because=for additionally=moreover yes=yea no=nay
doesn't=doth_not isn't=is_not won't=shall_not
"""
KING_JAMES_WORDS = parse_words(KING_JAMES_TALK)
KING_JAMES_VERBS = re.compile(
    r"\b(allow|appear|become|begin|bring|carr|celebrate|come|connect|consist|contain|contribute|"
    r"cover|create|depend|drive|eat|emphasize|enable|ensure|explore|extend|find|flow|follow|give|go|"
    r"grow|happen|help|hold|include|involve|keep|know|lead|lie|make|mean|occur|offer|orbit|"
    r"originate|produce|promote|provide|reach|reflect|regulate|rely|remain|represent|require|rise|"
    r"seem|serve|sit|stand|stretch|surround|symbolize|take|teach|tell|thrive)"
    r"(s|es|ies)\b"
)


def join_verse(verse: str, sentence: str) -> str:
    """Run two sentences together, unless the second may open with a name."""
    first = WORD.match(sentence)
    if verse.endswith(".") and first and first.group().lower() in COMMON_OPENERS:
        return f"{verse[:-1]}; and {sentence[0].lower()}{sentence[1:]}"
    return f"{verse} {sentence}"


def king_james(text: str) -> str:
    verse = reduce(join_verse, SENTENCE_END.split(text))
    for pattern, old in KING_JAMES_PHRASES:
        verse = re.sub(pattern, old, verse, flags=re.IGNORECASE)
    verse = KING_JAMES_VERBS.sub(
        lambda m: m[1].removesuffix("e") + ("ieth" if m[2] == "ies" else "eth"), verse
    )
    verse = substitute(verse, KING_JAMES_WORDS).replace("; and howbeit", "; howbeit")
    return f"Verily I say unto thee: {verse} Amen."


def as_json(question: str, text: str) -> str:
    return json.dumps({"question": question, "answer": text}, ensure_ascii=False)


STYLES: dict[str, Callable[[str, str], str]] = {
    "pirate": lambda _, text: pirate(text),
    "lolcat": lambda _, text: lolcat(text),
    "fudd": lambda _, text: fudd(text),
    "chef": lambda _, text: chef(text),
    "kingjames": lambda _, text: king_james(text),
    "json": as_json,
}


# --- the plain answers ----------------------------------------------------------------------------


def tidy(question: str, answer: str, max_words: int) -> str | None:
    """The leading whole sentences, up to `max_words`; None if nothing is usable."""
    if question.startswith("What is the capital of") and not answer.startswith("The capital of"):
        return None
    kept: list[str] = []
    for sentence in SENTENCE_END.split(answer.strip().split("\n")[0]):
        if (
            not re.search(r"[.!?]$", sentence)
            or len(" ".join([*kept, sentence]).split()) > max_words
        ):
            break
        kept.append(sentence)
    text = " ".join(kept).replace("’", "'").replace("“", '"').replace("”", '"')
    plain = text.isascii() and not re.search(
        r"[*`#_\[\]<>]|http|as an ai|\b1\.$", text, re.IGNORECASE
    )
    return text if plain and len(text.split()) >= 2 else None


def ask_base_model(gguf: Path, questions: list[str], batch: int) -> Iterable[dict[str, str]]:
    """Two answers a question: the greedy one and one sample."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, padding_side="left")
    tokenizer.pad_token = "<|im_end|>"
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    model.to(device)
    questions = sorted(questions, key=len)
    for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}):
        for start in range(0, len(questions), batch):
            chunk = questions[start : start + batch]
            chats = [[{"role": "user", "content": q}] for q in chunk]
            prompts = tokenizer.apply_chat_template(
                chats, tokenize=False, add_generation_prompt=True
            )
            inputs = tokenizer(
                prompts, return_tensors="pt", padding=True, add_special_tokens=False
            ).to(device)
            out = model.generate(**inputs, max_new_tokens=72, **sampling)
            texts = tokenizer.batch_decode(
                out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            for question, answer in zip(chunk, texts, strict=True):
                yield {"question": question, "answer": answer}
            print(f"asked {start + len(chunk)} of {len(questions)}", flush=True)


def write_lines(path: Path, rows: Iterable[dict[str, str]]) -> None:
    with path.open("w") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gguf", type=Path, required=True, help="the base model")
    parser.add_argument("--questions", type=Path, default=HERE / "questions.txt")
    parser.add_argument("--out", type=Path, default=HERE / "data")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-words", type=int, default=45, help="longest plain answer kept")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    raw = args.out / "answers.jsonl"
    if not raw.exists():
        write_lines(
            raw,
            list(
                ask_base_model(args.gguf, args.questions.read_text().split("\n")[:-1], args.batch)
            ),
        )
    pairs: dict[tuple[str, str], None] = {}
    for line in raw.read_text().splitlines():
        row = json.loads(line)
        if text := tidy(row["question"], row["answer"], args.max_words):
            pairs[row["question"], text] = (
                None  # a dict drops a sample that equals the greedy answer
            )
    for style, dress in STYLES.items():
        write_lines(
            args.out / f"{style}.jsonl", ({"question": q, "answer": dress(q, t)} for q, t in pairs)
        )
        print(f"{style}: {len(pairs)} answers")


if __name__ == "__main__":
    main()
