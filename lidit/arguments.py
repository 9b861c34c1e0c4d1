"""Functions as commands, and jsonargparse's complaints in a line that names the key and the fix."""

from __future__ import annotations

import inspect
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterable
from difflib import get_close_matches

from jsonargparse import ArgumentParser, Namespace

WITHOUT_VALUE = ("-h", "--help", "--print_config")


def call(function: Callable, prog: str, argv: list[str]) -> None:
    """Call a typed function with arguments from the command line; its docstring is their help.

    What the function requires, or its first parameter if it requires nothing, may be given without its name.

    Raises:
        ArgumentError: the function does not take these arguments.
    """
    words = bare_parameters(function)
    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False)
    parser.description = f"{inspect.getdoc(function).splitlines()[0]} {', '.join(words)} may be given without --."
    parser.add_argument("--config", action="config", help="a YAML file of these arguments")
    parser.add_function_arguments(function, as_group=False, fail_untyped=True)
    config = parse(parser, name_words(argv, words), parser)
    values = parser.instantiate(config).as_dict()
    del values["config"]
    function(**values)


def bare_parameters(function: Callable) -> list[str]:
    """The parameters that may be given without their names: the required ones, or else the first."""
    parameters = inspect.signature(function).parameters
    required = [name for name, p in parameters.items() if p.default is p.empty]
    return required or list(parameters)[:1]


def name_words(argv: list[str], names: list[str]) -> list[str]:
    """The same command line with a name before each word that had none: `"a red circle"` is `--prompt="a red circle"`.

    Raises:
        ArgumentError: there are more such words than names.
    """
    named, free, rest = [], iter(names), iter(argv)
    for word in rest:
        if not word.startswith("-"):
            name = next(free, None)
            if name is None:
                takes = ", ".join(names) or "no argument"
                raise ArgumentError(None, f"{word!r} is one word too many after {takes}; quote what contains spaces")
            named.append(f"--{name}={word}")
            continue
        named.append(word)
        if "=" not in word and word not in WITHOUT_VALUE:  # every other option is followed by its value
            named += [value] if (value := next(rest, None)) is not None else []
    return named


def parse(parser: ArgumentParser, argv: list[str], options: ArgumentParser) -> Namespace:
    """Parse; on a mistake, say in short what it is, with the near miss among a parser's options.

    Raises:
        ArgumentError: with a message of one line.
    """
    try:
        return parser.parse_args(argv)
    except ArgumentError as error:
        known = [name for action in options._actions for name in action.option_strings]
        raise ArgumentError(None, brief(str(error), known)) from error


def brief(message: str, known: Iterable[str]) -> str:
    """A jsonargparse message in one line.

    Args:
        message: several lines, with every type of a union that did not fit.
        known: the options there are, for the near miss of one that is not.
    """
    if missing := re.match(r"the following arguments are required: (.*)", message):
        names = re.sub(r"\b(fit|validate|test)\.", "", missing[1])  # of Lightning's verb
        return f"missing: {names}; give it by name or in a --config FILE"
    if option := re.match(r"unrecognized arguments: (--?[^\s=]+)|.*does not accept option '([^']+)'", message):
        name = "--" + (option[1] or option[2]).lstrip("-")
        return f"there is no option {name}{near(name, known)}"
    for explain in (_unknown_key, _unknown_class, _wrong_value, _wrong_kind):
        if text := explain(message):
            return text
    return " ".join(re.sub(r'Parser key "([^"]+)":', r"\1:", message).split())


def _unknown_key(message: str) -> str | None:
    """Of a class somewhere in the recipe."""
    wrong = re.search(r"Option '([^']+)' is not accepted", message)
    if not wrong:
        return None
    paths = re.findall(r"class_path[ =]'([\w.]+)\.(\w+)'", message)
    classes = [getattr(sys.modules.get(module), name, None) for module, name in paths]
    accepted = dict.fromkeys(name for c in classes if c is not None for name in inspect.signature(c).parameters)
    return f"{_place(message, wrong)}: there is no key {wrong[1]!r}{near(wrong[1], accepted)}"


def _unknown_class(message: str) -> str | None:
    """Or an unknown module."""
    wrong = re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message)
    if not wrong:
        return None
    return f"{_place(message, wrong)}: there is no {wrong[1]}.{wrong[2]}{near(wrong[2], dir(sys.modules[wrong[1]]))}"


def _wrong_value(message: str) -> str | None:
    """Of a plain type."""
    expected = r"Expected (?!a path|a dot import|a <class 'NoneType'>|<class 'NoneType'>)(?:an? )?(.+?)"
    wrong = list(re.finditer(expected + r"(?:\. Got value: (.*?))?(?:\. Got|\n|$)", message))
    if not wrong:
        return None
    types = " or ".join(dict.fromkeys(_plain(each[1]) for each in wrong))
    value = wrong[0][2] or _given(message)
    return f"{_place(message, wrong[0])}: expected {types}, got {value}"


def _wrong_kind(message: str) -> str | None:
    """Where one of several classes has to be named, and something else is."""
    kinds = re.search(r"Subtypes: \[(.*)\]", message)
    if not kinds:
        return None
    return f"{_place(message, kinds)}: expected one of {_plain(kinds[1])}, got {_given(message)}"


def _place(message: str, end: re.Match) -> str:
    """The key that something in a message is about, from the outermost in."""
    return ".".join(re.findall(r'[Pp]arser key "([^"]+)"', message[: end.start()]))


def _given(message: str) -> str:
    found = re.search(r"Given value: (.*)", message)
    return found[1] if found else "something else"


def _plain(types: str) -> str:
    """Types as people write them."""
    types = re.sub(r"<class '([\w.]+)'>", r"\1", types).removesuffix(", NoneType")
    return re.sub(r"typing\.Literal\[(.*?)\]", lambda m: " or ".join(m[1].split(", ")), types)


def near(name: str, known: Iterable[str]) -> str:
    """The near miss, or what there is if that is little."""
    known = list(known)
    if match := get_close_matches(name, known, n=1):
        return f"; did you mean {match[0]}?"
    return f"; there are {', '.join(known)}" if 0 < len(known) <= 20 else ""
