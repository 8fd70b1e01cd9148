"""A conversation as HTML, in which every text is escaped."""

import html
import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from mha2mla_vlm.serving.chat.live import Moment
from mha2mla_vlm.serving.chat.question import Turn
from mha2mla_vlm.utils.shown import size_text

NEAR = 0.02  # of a whole number: a share of the cache that is said as one over it
WORD = re.compile(r"\S+")
TEMPLATE = str.maketrans({"$": "&#36;", "{": "&#123;", "}": "&#125;", "`": "&#96;"})  # gradio fills in values


def escaped(text: str) -> str:
    """Text as HTML that nothing in it can leave."""
    return html.escape(text).translate(TEMPLATE)


def history_html(names: Sequence[str], turns: Sequence[Turn], asked: str) -> str:
    """Earlier turns, and what was `asked` now (`question_html`)."""
    earlier = [
        f'<div class="turn">{question_html(turn.question, turn.thumbnail)}'
        f"{answers_html(names, turn.answers, whole=True)}</div>"
        for turn in turns
    ]
    return "".join([*earlier, f'<div class="turn">{asked}</div>'])


def question_html(question: str, thumbnail: str | None) -> str:
    """A question and the image that came with it, a `data:` URL."""
    image = "" if thumbnail is None else f'<img src="{html.escape(thumbnail)}" alt="image of the question">'
    return f'<div class="asked">{image}<p>{escaped(question)}</p></div>'


def answers_html(names: Sequence[str], moments: Sequence[Moment | None], *, whole: bool = False) -> str:
    """Answers side by side, None for one that waits; when two are `whole`, words that differ are marked."""
    compared, note = whole and len(moments) == 2, ""
    texts = [moment.text if moment is not None else "" for moment in moments]
    shown = [marked(one, other) for one, other in zip(texts, texts[::-1], strict=True)]
    cells = [
        f'<section class="answer" data-side="{number}"><h4>{escaped(name)}</h4>'
        f'<p class="text">{shown[number] if compared else escaped(texts[number])}</p>'
        f'<p class="cache">{_state(moment)}</p></section>'
        for number, (name, moment) in enumerate(zip(names, moments, strict=True))
    ]
    if compared:
        note = "The same answer." if texts[0].split() == texts[1].split() else "Words that differ are marked."
    return f'<div class="answers">{"".join(cells)}</div><p class="compared" role="status">{note}</p>'


def marked(text: str, other: str) -> str:
    """A text as HTML, with the words marked that another text does not have in their place."""
    words, theirs = WORD.findall(text), WORD.findall(other)
    changes = SequenceMatcher(None, words, theirs, autojunk=False).get_opcodes()
    differing = {at for kind, start, end, *_ in changes if kind != "equal" for at in range(start, end)}
    parts, last = [], 0
    for number, word in enumerate(WORD.finditer(text)):
        shown = escaped(word[0])
        parts += [text[last : word.start()], f"<mark>{shown}</mark>" if number in differing else shown]
        last = word.end()
    return "".join(parts) + text[last:]


def saving_html(names: Sequence[str], moments: Sequence[Moment]) -> str:
    """How much smaller the second cache is, large, and both in bytes; empty unless there are two."""
    if len(moments) != 2:
        return ""
    before, after = moments
    share = (after.cache_bytes / after.cached_tokens) / (before.cache_bytes / before.cached_tokens)
    if before.cached_tokens == after.cached_tokens:
        sizes = f"{size_text(after.cache_bytes)} instead of {size_text(before.cache_bytes)}"
        detail = f"{sizes} for the {after.cached_tokens:,} tokens of this conversation"
    else:
        theirs, ours = (f"{size_text(m.cache_bytes)} for {m.cached_tokens:,} tokens" for m in moments)
        detail = f"{ours} of this conversation instead of {theirs}; {share:.1%} for each token"
    title = f"{fraction(share)} of the cache" if share < 1 else "No smaller cache"
    return f"<strong>{title}</strong>{escaped(names[1])}: {detail}"


def fraction(share: float) -> str:
    """A share as one over a whole number if it is near one, else in percent."""
    parts = round(1 / share)
    return f"1/{parts}" if parts > 1 and abs(1 / share - parts) < NEAR * parts else f"{share:.1%}"


def _state(moment: Moment | None) -> str:
    """Bytes of the cache, and the speed."""
    if moment is None:
        return "waiting"
    rate = "" if moment.rate is None else f", {moment.rate:.1f} tokens per second"
    return f"{moment.cache_bytes:,} bytes for {moment.cached_tokens:,} tokens{rate}"
