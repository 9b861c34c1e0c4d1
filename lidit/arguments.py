"""Typed functions as commands, and jsonargparse's errors in one line that names the key and the fix."""

from __future__ import annotations

import inspect
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Sequence, Set
from difflib import get_close_matches

from jsonargparse import ArgumentParser, Namespace

WITHOUT_VALUE = ("-h", "--help", "--print_config")


def call(function: Callable, prog: str, argv: list[str]) -> object:
    """Call a typed function with arguments from the command line; its docstring is their help.

    Raises:
        ArgumentError: the function does not take these arguments.
    """
    (values,) = parse_functions([function], prog, argv)
    return function(**values)


def parse_functions(
    functions: Sequence[Callable], prog: str, argv: list[str], without: Set[str] = frozenset()
) -> list[dict[str, object]]:
    """Arguments of typed functions from one command line, a dict for each function.

    Required parameters, or if there are none the first one of the first function, may be given without their names.

    Args:
        functions: typed functions; their docstrings are the arguments' help, and the first line of the last one is the
            command's help.
        prog: the command's name.
        argv: the command line after it.
        without: parameters that the command line does not set.

    Raises:
        ArgumentError: the functions do not take these arguments.
    """
    words = [word for function in functions for word in required(function) if word not in without]
    words = words or list(inspect.signature(functions[0]).parameters)[:1]
    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False)
    parser.description = f"{inspect.getdoc(functions[-1]).splitlines()[0]} {', '.join(words)} may be given without --."
    parser.add_argument("--config", action="config", help="a YAML file of these arguments")
    settings = {"as_group": False, "fail_untyped": True, "skip": set(without)}
    for function in functions:
        if inspect.ismethod(function):
            parser.add_method_arguments(type(function.__self__), function.__name__, **settings)
        else:
            parser.add_function_arguments(function, **settings)
    parameters = inspect.signature(functions[-1]).parameters
    several = bool(words) and words[-1] in parameters and "list" in str(parameters[words[-1]].annotation)
    values = parser.instantiate(parse(parser, name_words(argv, words, several), parser)).as_dict()
    return [{k: values[k] for k in inspect.signature(f).parameters if k not in without} for f in functions]


def take(argv: list[str], option: str) -> tuple[str | None, list[str]]:
    """An option's value, or None if it is not given, and the rest of the command line.

    Raises:
        ArgumentError: the option has no value.
    """
    for i, word in enumerate(argv):
        if word.startswith(f"{option}="):
            return word.partition("=")[2], argv[:i] + argv[i + 1 :]
        if word == option:
            if i + 1 == len(argv):
                raise ArgumentError(None, f"{option} needs a value")
            return argv[i + 1], argv[:i] + argv[i + 2 :]
    return None, argv


def required(function: Callable) -> list[str]:
    """The names of a function's parameters without a default."""
    return [name for name, p in inspect.signature(function).parameters.items() if p.default is p.empty]


def name_words(argv: list[str], names: list[str], several: bool = False) -> list[str]:
    """The same command line with a name before each word that had none: `"a red circle"` is `--prompt="a red circle"`.

    Hyphens within the names of options become the underscores they have in Python.

    Args:
        argv: the command line.
        names: names for the words that have none, in their order.
        several: whether the last name takes any number of words.

    Raises:
        ArgumentError: there are more such words than names.
    """
    named, free, rest = [], iter(names), iter(argv)
    for word in rest:
        if not word.startswith("-"):
            name = next(free, names[-1] if several else None)
            if name is None:
                takes = ", ".join(names) or "no argument"
                raise ArgumentError(None, f"{word!r} is one word too many after {takes}; quote what contains spaces")
            named.append(f"--{name}{'+' * (several and name == names[-1])}={word}")
            continue
        option, equals, value = word.partition("=")
        named.append("--" + option[2:].replace("-", "_") + equals + value if option.startswith("--") else word)
        if not equals and word not in WITHOUT_VALUE:  # every other option is followed by its value
            named += [value] if (value := next(rest, None)) is not None else []
    return named


def parse(parser: ArgumentParser, argv: list[str], options: ArgumentParser) -> Namespace:
    """Parse a command line; a mistake is named in one line, with the most similar of a parser's options.

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
        message: jsonargparse's message of several lines, with every type of a union that did not fit.
        known: the options that exist, of which the most similar is suggested.
    """
    if missing := re.match(r"the following arguments are required: (.*)", message):
        names = re.sub(r"\b(fit|validate|test)\.", "", missing[1])  # of Lightning's verb
        return f"missing: {names}; give it by name or in a --config FILE"
    if option := re.match(r"unrecognized arguments: (--?[^\s=]+)|.*does not accept option '([^']+)'", message):
        name = "--" + (option[1] or option[2]).lstrip("-")
        return f"there is no option {name}{near(name, known)}"
    for explain in (
        _unknown_key,
        _unknown_class,
        _broken_contract,
        _wrong_factory,
        _wrong_value,
        _no_class,
        _wrong_kind,
    ):
        if text := explain(message):
            return text
    return " ".join(re.sub(r'Parser key "([^"]+)":', r"\1:", message).split())


def _unknown_key(message: str) -> str | None:
    """Explain a key that a class in the recipe does not have."""
    wrong = re.search(r"Option '([^']+)' is not accepted", message)
    if not wrong:
        return None
    paths = re.findall(r"class_path[ =]'([\w.]+)\.(\w+)'", message)
    classes = [getattr(sys.modules.get(module), name, None) for module, name in paths]
    accepted = dict.fromkeys(name for c in classes if c is not None for name in inspect.signature(c).parameters)
    return f"{_place(message, wrong)}: there is no key {wrong[1]!r}{near(wrong[1], accepted)}"


def _unknown_class(message: str) -> str | None:
    """Explain a class that its module does not have."""
    wrong = re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message)
    if not wrong:
        return None
    return f"{_place(message, wrong)}: there is no {wrong[1]}.{wrong[2]}{near(wrong[2], dir(sys.modules[wrong[1]]))}"


def _broken_contract(message: str) -> str | None:
    """Explain a class that lacks a method of its contract, or whose methods take other arguments."""
    wrong = re.search(r"Import path ([\w.]+)\.(\w+) does not implement protocol (\w+)", message)
    if not wrong:
        return None
    kind, contracts = getattr(sys.modules.get(wrong[1]), wrong[2], None), sys.modules["lidit.models.contracts"]
    lacking = [name for name in vars(getattr(contracts, wrong[3])) if name[0] != "_" and not hasattr(kind, name)]
    why = f"it has no {', '.join(lacking)}" if lacking else "its methods take other arguments"
    what = f"{wrong[1]}.{wrong[2]} is no {wrong[3].lower()}: {why}"
    return f"{_place(message, wrong)}: {what}; lidit.models.contracts.{wrong[3]} describes each"


def _wrong_factory(message: str) -> str | None:
    """Explain a class whose constructor needs other arguments than its part is given."""
    wrong = re.search(r"Type \S*Callable\[\[(.*?)\], ([\w.]+)\] expects a function or a callable class", message)
    if not wrong or "arser key" in message[wrong.end() :]:  # then it is about one of its arguments
        return None
    path = re.search(r"class_path[ =:']*?'([\w.]+)'", message)
    kind = path[1] if path else _given(message)
    what = f"{kind} does not make a {_plain(wrong[2])} from ({_plain(wrong[1])}) alone"
    return f"{_place(message, wrong)}: {what}; give its other arguments as init_args, or name another class"


def _wrong_value(message: str) -> str | None:
    """Explain a value of a wrong plain type."""
    expected = r"Expected (?!a path|a dot import|a <class 'NoneType'>|<class 'NoneType'>)(?:an? )?(.+?)"
    wrong = list(re.finditer(expected + r"(?:\. Got value: (.*?))?(?:\. Got|\n|$)", message))
    if not wrong:
        return None
    types = " or ".join(dict.fromkeys(_plain(each[1]) for each in wrong))
    value = wrong[0][2] or _given(message)
    return f"{_place(message, wrong[0])}: expected {types}, got {value}"


def _no_class(message: str) -> str | None:
    """Where a class has to be named, and something else is."""
    wrong = re.search(r"Expected a dot import path string: (\S+)", message)
    if not wrong or "Subtypes:" in message:
        return None
    return f"{_place(message, wrong)}: expected a class by its import path, such as lidit.models.x.Y, got {wrong[1]}"


def _wrong_kind(message: str) -> str | None:
    """Explain a value where one of several classes has to be named."""
    kinds = re.search(r"Subtypes: \[(.*)\]", message)
    if not kinds:
        return None
    return f"{_place(message, kinds)}: expected one of {_plain(kinds[1])}, got {_given(message)}"


def _place(message: str, end: re.Match) -> str:
    """The full key, outermost first, that a message names before a place in it."""
    return ".".join(re.findall(r'[Pp]arser key "([^"]+)"', message[: end.start()]))


def _given(message: str) -> str:
    found = re.search(r"Given value: (.*)", message)
    return found[1] if found else "something else"


def _plain(types: str) -> str:
    """Names of types as people write them."""
    types = re.sub(r"<class '([\w.]+)'>", r"\1", types).removesuffix(", NoneType")
    return re.sub(r"typing\.Literal\[(.*?)\]", lambda m: " or ".join(m[1].split(", ")), types)


def near(name: str, known: Iterable[str]) -> str:
    """The end of a message: the most similar of the known names, or all of them if they are few."""
    known = list(known)
    if match := get_close_matches(name, known, n=1):
        return f"; did you mean {match[0]}?"
    return f"; there are {', '.join(known)}" if 0 < len(known) <= 20 else ""
