"""Read folders of pictures, and decide which pictures are compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from PIL import Image

from lidit.disk.folder import PROVENANCE

KINDS = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Picture:
    """A picture in a folder.

    Args:
        path: where the file is.
        prompt: the text that it was drawn for.
        size: width and height in pixels.
        facts: the other text chunks that `lidit sample` wrote into it: seed, steps, checkpoint.
    """

    path: Path
    prompt: str
    size: tuple[int, int]
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def order(self) -> tuple[int, str]:
        """Pictures of the same prompt are sorted by sample number, or else by seed, so that none is picked by hand."""
        number = self.facts.get("sample", self.facts.get("seed", "0"))
        return int(number) if number.isdecimal() else 0, str(self.path)


@dataclass(frozen=True)
class Competitor:
    """A model, known by a folder of pictures that it drew.

    Args:
        name: its name in the report; raters never see it.
        folder: where its pictures are.
        pictures: one picture for each prompt.
        spare: how many pictures are left out because an earlier one has the same prompt.
        silent: how many pictures are left out because they have no prompt.
        provenance: the text of the folder's provenance.json; empty: there is no such file.
    """

    name: str
    folder: Path
    pictures: dict[str, Picture]
    spare: int = 0
    silent: int = 0
    provenance: str = ""


def name_folders(words: list[str]) -> dict[str, Path]:
    """Folders by name, from words like NAME=FOLDER; a word FOLDER alone is also the name.

    Raises:
        ValueError: there are fewer than two folders, two have the same name, or a name is empty.
    """
    pairs = []
    for word in words:
        name, equals, folder = word.partition("=")
        alone = not equals or Path(word).is_dir()  # a folder's own name may contain an equals sign
        pairs.append((Path(word).name, Path(word)) if alone else (name.strip(), Path(folder)))
    if len(pairs) < 2:
        raise ValueError("name two or more folders of pictures: lidit study serve ours=runs/a theirs=runs/b")
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two folders are called {twice!r}; give them different names: NAME=FOLDER")
    if "" in names:
        raise ValueError("a folder has an empty name; write NAME=FOLDER")
    return dict(pairs)


def read_competitors(words: list[str]) -> list[Competitor]:
    """Read the folders that `name_folders` names.

    Raises:
        ValueError: there are fewer than two folders, or one has no pictures with prompts.
    """
    return [read_folder(name, folder) for name, folder in name_folders(words).items()]


def read_folder(name: str, folder: Path) -> Competitor:
    """Read a folder and its subfolders, and take the first picture of each prompt.

    Raises:
        ValueError: it is not a folder, or none of its pictures has a prompt.
    """
    if not folder.is_dir():
        raise ValueError(f"{name}: {folder} is not a folder; name one with pictures that `lidit sample` wrote")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in KINDS)
    found = [picture for path in files if (picture := read_picture(path))]
    if not found:
        raise ValueError(
            f"{name}: none of {len(files)} pictures in {folder} has a prompt; `lidit sample --prompts` writes it into "
            "its PNG files; for other pictures put it into a text file beside each: 1.jpg, 1.txt"
        )
    first: dict[str, Picture] = {}
    for picture in sorted(found, key=lambda each: each.order):
        first.setdefault(picture.prompt, picture)
    provenance = folder / PROVENANCE
    about = provenance.read_text(encoding="utf-8") if provenance.is_file() else ""
    return Competitor(name, folder, first, len(found) - len(first), len(files) - len(found), about)


def read_picture(path: Path) -> Picture | None:
    """A picture with its prompt, from the text file beside it or from its text chunks; None: it has no prompt.

    Raises:
        ValueError: it is not a picture, or the text file is not UTF-8.
    """
    try:
        with Image.open(path) as image:
            size = image.size
            chunks = dict(image.text) if path.suffix.lower() == ".png" else {}  # reading `text` reads the whole PNG
    except (OSError, SyntaxError, AttributeError) as error:  # what Pillow raises for a file that it cannot read
        kind = path.suffix[1:].upper()
        raise ValueError(f"{path} is not a {kind} file, or is damaged ({error}); remove it or draw it again") from None
    facts = {key: str(value) for key, value in chunks.items()}
    beside = path.with_suffix(".txt")
    try:
        prompt = beside.read_text(encoding="utf-8-sig") if beside.is_file() else facts.pop("prompt", "")
    except UnicodeDecodeError as error:
        raise ValueError(f"{beside} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    prompt = " ".join(prompt.split())
    return Picture(path, prompt, size, facts) if prompt else None


def matches(competitors: list[Competitor], every: bool) -> Iterator[tuple[str, Competitor, Competitor]]:
    """Every comparison: the prompt, the first and the second model.

    Args:
        competitors: two or more.
        every: compare every two models; otherwise only the first with each other one, as in the paper.
    """
    for a, b in combinations(competitors, 2):
        if every or a is competitors[0]:
            yield from ((prompt, a, b) for prompt in a.pictures if prompt in b.pictures)


def describe(competitors: list[Competitor]) -> str:
    """How many prompts are compared, what is left out, and why, as one line."""
    names = [each.name for each in competitors]
    prompts = dict.fromkeys(prompt for each in competitors for prompt in each.pictures)
    holders = {prompt: [each.name for each in competitors if prompt in each.pictures] for prompt in prompts}
    in_all = sum(len(names) == len(who) for who in holders.values())
    parts = [f"{in_all} prompts in all of {', '.join(names)}"]
    in_some = sum(1 < len(who) < len(names) for who in holders.values())
    parts += [f"{in_some} in some of them, compared between those"] if in_some else []
    for name in names:
        alone = [prompt for prompt, who in holders.items() if who == [name]]
        parts += [f"{len(alone)} only in {name}, left out (such as {alone[0]!r})"] if alone else []
    for each in competitors:
        parts += [f"{each.spare} more pictures of the same prompts in {each.name}, left out"] if each.spare else []
        parts += [f"{each.silent} pictures without a prompt in {each.name}, left out"] if each.silent else []
    sizes = {each.name: {picture.size for picture in each.pictures.values()} for each in competitors}
    if any(size != sizes[names[0]] for size in sizes.values()):
        parts += ["the models' pictures differ in size, so raters can tell them apart"]
    return "; ".join(parts)
