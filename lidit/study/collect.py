"""Folders of pictures -> which pictures are compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from PIL import Image

from lidit.folder import PROVENANCE

KINDS = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Picture:
    """A picture in a folder.

    Args:
        path: of the file.
        prompt: what it was drawn for.
        size: width and height in pixels.
        facts: the other text chunks that `lidit sample` wrote into it: seed, steps, checkpoint.
    """

    path: Path
    prompt: str
    size: tuple[int, int]
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def order(self) -> tuple[int, str]:
        """Of several pictures of a prompt the first sample comes first, of the first seed: none is picked by hand."""
        number = self.facts.get("sample", self.facts.get("seed", "0"))
        return int(number) if number.isdecimal() else 0, str(self.path)


@dataclass(frozen=True)
class Competitor:
    """A model, as the folder of what it drew.

    Args:
        name: for the report; raters never see it.
        folder: where its pictures are.
        pictures: by prompt, one each.
        spare: pictures left out because their prompt has an earlier one.
        silent: files left out because nothing says what they were drawn for.
        provenance: what the folder says of itself, as JSON; empty: nothing.
    """

    name: str
    folder: Path
    pictures: dict[str, Picture]
    spare: int = 0
    silent: int = 0
    provenance: str = ""


def name_folders(words: list[str]) -> dict[str, Path]:
    """Folders by name, written NAME=FOLDER, or FOLDER for one that is called like itself.

    Raises:
        ValueError: there are fewer than two, or two have one name.
    """
    pairs = []
    for word in words:
        name, equals, folder = word.partition("=")
        itself = not equals or Path(word).is_dir()  # a folder's own name may hold an equals sign
        pairs.append((Path(word).name, Path(word)) if itself else (name.strip(), Path(folder)))
    if len(pairs) < 2:
        raise ValueError("name two or more folders of pictures: lidit study serve ours=runs/a theirs=runs/b")
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two folders are called {twice!r}; name each another way: NAME=FOLDER")
    if "" in names:
        raise ValueError("a folder has an empty name; write NAME=FOLDER")
    return dict(pairs)


def read_competitors(words: list[str]) -> list[Competitor]:
    """Read the folders that `name_folders` names.

    Raises:
        ValueError: there are not two or more folders of pictures.
    """
    return [read_folder(name, folder) for name, folder in name_folders(words).items()]


def read_folder(name: str, folder: Path) -> Competitor:
    """The first picture of each prompt in a folder and the folders within it.

    Raises:
        ValueError: it is no folder, or no picture in it says what it was drawn for.
    """
    if not folder.is_dir():
        raise ValueError(f"{name}: {folder} is no folder; name one with pictures that `lidit sample` wrote")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in KINDS)
    found = [picture for path in files if (picture := read_picture(path))]
    if not found:
        raise ValueError(
            f"{name}: none of {len(files)} pictures in {folder} says what it was drawn for; `lidit sample --prompts` "
            "writes the prompt into its PNG files, for others put it into a text file beside each: 1.jpg, 1.txt"
        )
    first: dict[str, Picture] = {}
    for picture in sorted(found, key=lambda each: each.order):
        first.setdefault(picture.prompt, picture)
    provenance = folder / PROVENANCE
    about = provenance.read_text(encoding="utf-8") if provenance.is_file() else ""
    return Competitor(name, folder, first, len(found) - len(first), len(files) - len(found), about)


def read_picture(path: Path) -> Picture | None:
    """A picture with its prompt from the text file beside it or its own text chunks; None: neither has one.

    Raises:
        ValueError: it is no picture, or its text is not UTF-8.
    """
    try:
        with Image.open(path) as image:
            size = image.size
            chunks = dict(image.text) if path.suffix.lower() == ".png" else {}  # reads all of a PNG
    except (OSError, SyntaxError, AttributeError) as error:  # as Pillow says what it cannot read
        kind = path.suffix[1:].upper()
        raise ValueError(f"{path} is no {kind}, or damaged ({error}); remove it or draw it again") from None
    facts = {key: str(value) for key, value in chunks.items()}
    beside = path.with_suffix(".txt")
    try:
        prompt = beside.read_text(encoding="utf-8-sig") if beside.is_file() else facts.pop("prompt", "")
    except UnicodeDecodeError as error:
        raise ValueError(f"{beside} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    prompt = " ".join(prompt.split())
    return Picture(path, prompt, size, facts) if prompt else None


def matches(competitors: list[Competitor], every: bool) -> Iterator[tuple[str, Competitor, Competitor]]:
    """What is compared: prompt, first and second model.

    Args:
        competitors: two or more.
        every: every two of them, else only the first with each other, as the paper does.
    """
    for a, b in combinations(competitors, 2):
        if every or a is competitors[0]:
            yield from ((prompt, a, b) for prompt in a.pictures if prompt in b.pictures)


def describe(competitors: list[Competitor]) -> str:
    """In a sentence how many prompts are compared, and what is left out and why."""
    names = [each.name for each in competitors]
    prompts = dict.fromkeys(prompt for each in competitors for prompt in each.pictures)
    holders = {prompt: [each.name for each in competitors if prompt in each.pictures] for prompt in prompts}
    whole = sum(len(names) == len(who) for who in holders.values())
    said = [f"{whole} prompts in all of {', '.join(names)}"]
    some = sum(1 < len(who) < len(names) for who in holders.values())
    said += [f"{some} in some of them, compared between those"] if some else []
    for name in names:
        alone = [prompt for prompt, who in holders.items() if who == [name]]
        said += [f"{len(alone)} only in {name}, left out (such as {alone[0]!r})"] if alone else []
    for each in competitors:
        said += [f"{each.spare} further pictures of the same prompts in {each.name}, left out"] if each.spare else []
        said += [f"{each.silent} pictures without a prompt in {each.name}, left out"] if each.silent else []
    sizes = {each.name: {picture.size for picture in each.pictures.values()} for each in competitors}
    if any(own != sizes[names[0]] for own in sizes.values()):
        said += ["the models' pictures differ in size, by which raters can tell them apart"]
    return "; ".join(said)
