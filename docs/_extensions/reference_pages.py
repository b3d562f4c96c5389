"""The reference: a page for each public name, its types, and what the methods report.

The pages are written before the site is read, from ``gradxform/__init__.pyi``, the sources and the
docstrings. Nothing is written by hand, so nothing can be out of date.
"""

import inspect
import re
from importlib import import_module
from pathlib import Path
from textwrap import indent
from typing import Annotated, Any, NamedTuple, get_args, get_origin

import sources
from files import remove_others, write
from markup import escaped, sentence, table, title
from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring

import gradxform
from gradxform.hyperparameters import Interval


class Group(NamedTuple):
    """Public names on one page of the reference."""

    name: str
    title: str
    modules: str  #: a pattern of the modules that they come from
    text: str


GROUPS = (
    Group(
        "first_order",
        "First-order methods",
        r"first_order\.",
        "These methods need the gradient alone. They work on minibatches.",
    ),
    Group(
        "second_order",
        "Second-order methods",
        r"second_order\.(?!kronecker_inverse)",
        "These methods use curvature, exact or learnt from the path.",
    ),
    Group(
        "searches",
        "Searches and minimisation",
        r"(line_search|minimization|fitting|evaluation|progress|stopping)",
        "A line search finds the step along a direction. :func:`gradxform.minimize` runs any "
        "method to the end.",
    ),
    Group(
        "wrappers",
        "Wrappers",
        r"(wrappers\.|averaging|projections?|proximal|precision|rounding|bounds)",
        "A wrapper changes what another method sees or reports.",
    ),
    Group(
        "schedules",
        "Schedules",
        r"schedules",
        "A schedule gives the learning rate of each update. Schedules of Optax work too.",
    ),
    Group(
        "curvature",
        "Curvature and objectives",
        r"(curvature|objective|squares|preconditioners|covariance|forward|per_example|second_order)",
        "A curvature turns an objective and a point into products with a matrix.",
    ),
    Group(
        "results",
        "Results",
        r"solution",
        "These are what :func:`gradxform.minimize` returns.",
    ),
    Group("more", "More", r"", "These names are in none of the other groups."),
)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", _write_pages)
    app.connect("autodoc-process-signature", _no_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


# -- signatures and docstrings


def _no_signature(
    app: Sphinx, what: str, name: str, value: Any, options: Any, given: str, result: str
) -> tuple[str, str] | None:
    """Results are read, not built: their fields are listed one by one."""
    return ("", "") if what == "class" else None


_KEPT = re.compile(r"``[^`]+``|:\w+:`[^`]+`|^.*::\n(?:\n| +.*\n)*|^>>> (?:.+\n)*", re.M)
_COLUMNS = re.compile(r"(?P<head>^( *)\.\. math::\n\n*)(?P<body>(?:\2 +.*\n|\n)*)", re.M)
_FORMULA = re.compile(r"^(?!\.\.)(\S.*\S)::\n\n(?= +\S)", re.M)  # in plain text, no program
_SECTION = re.compile(r"^(?P<name>Returns|Raises):\n(?P<body>(?: +.*\n|\n)+)", re.M)


def _docstring(app: Sphinx, value: Any) -> str:
    """The docstring of a function or class in reStructuredText."""
    text = (inspect.getdoc(value) or "") + "\n"
    text = re.sub(_SECTION, _section, text)
    text = _with_plain_bars(text)
    text = re.sub(_COLUMNS, _columns, text)
    text = re.sub(_FORMULA, "\\1:\n\n.. code-block:: text\n\n", text)
    text = re.sub(r"^>>> ", ".. rubric:: Example\n\n>>> ", text, count=1, flags=re.M)
    return _full_names(str(GoogleDocstring(text, app.config, app)))


def _full_names(text: str) -> str:
    """Public names that are written without the package, as in its modules, get it."""

    def full(found: re.Match[str]) -> str:
        role, name = found.groups()
        return f":{role}:`gradxform.{name}`" if name in sources.public() else found[0]

    return re.sub(r":(func|class):`(\w+)`", full, text)


def _section(found: re.Match[str]) -> str:
    """What is returned or raised, as fields: Napoleon would take words for names of types."""
    body = inspect.cleandoc(found["body"])
    fields = [f":returns: {body}"]
    if found["name"] == "Raises":
        fields = []
        for entry in re.split(r"\n(?=\S)", body):
            types = re.match(r"\w+(?:, \w+)*(?=: )", entry)
            fields.append(f":raises {entry}" if types else f":raises Exception: {entry}")
    return "\n".join([*(field.replace("\n", "\n   ") for field in fields), "", ""])


def _with_plain_bars(text: str) -> str:
    """Absolute values in the text as such: bars alone would be a substitution."""
    kept = list(re.finditer(_KEPT, text))
    starts, ends = [0, *(m.end() for m in kept)], [*(m.start() for m in kept), len(text)]
    plain = [text[a:b].replace("|", r"\|") for a, b in zip(starts, ends, strict=True)]
    between = [*(m[0] for m in kept), ""]
    return "".join(a + b for a, b in zip(plain, between, strict=True))


def _columns(found: re.Match[str]) -> str:
    """A formula; Sphinx puts several lines into ``split``, which has room for one & a line."""
    lines = [line.strip() for line in found["body"].splitlines() if line.strip()]
    if all(line.count("&") < 2 for line in " ".join(lines).split(r"\\")):
        return found[0]
    indent = found[2] + "   "
    lines = [r"\begin{aligned}", *lines, r"\end{aligned}"]
    return found["head"] + "".join(f"{indent}{line}\n" for line in lines) + "\n"


# -- pages


def _write_pages(app: Sphinx) -> None:
    folder = Path(app.srcdir, "reference", "generated")
    pages = {name: _page(app, name) for name in sources.public()}
    pages |= {"types": _types_page(app), "info": _info_page()}
    for name, text in pages.items():
        write(folder / f"{name}.rst", text)
    groups = _grouped()
    for group, names in groups.items():
        write(folder / "groups" / f"{group.name}.rst", _group_page(group, names))
    remove_others(folder, {f"{name}.rst" for name in pages} | {"config.rst", "commands.rst"})
    remove_others(folder / "groups", {f"{group.name}.rst" for group in groups})


def _grouped() -> dict[Group, list[str]]:
    found: dict[Group, list[str]] = {}
    for name, module in sources.public().items():
        path = module.removeprefix("gradxform.")
        group = next(group for group in GROUPS if re.match(group.modules, path))
        found.setdefault(group, []).append(name)
    return {group: found[group] for group in GROUPS if group in found}


def _group_page(group: Group, names: list[str]) -> str:
    rows = [(f":py:obj:`gradxform.{name}`", _summary(name)) for name in names]
    entries = "\n".join(f"   ../{name}" for name in names)
    tree = f".. toctree::\n   :hidden:\n\n{entries}\n"
    head = f".. currentmodule:: gradxform\n\n{title(group.title)}\n{group.text}\n"
    return "\n".join([head, table(("name", "what it is"), rows, "30 70"), tree])


def _summary(name: str) -> str:
    return _full_names(sources.summary(name))


def _page(app: Sphinx, name: str) -> str:
    value = getattr(gradxform, name)
    parts = [".. currentmodule:: gradxform\n", title(name)]
    if inspect.isclass(value):
        parts.append(f".. autoclass:: gradxform.{name}\n   :members:\n   :undoc-members:\n")
    elif sources.is_function(name):
        arguments, result = sources.signature(name)  # as written, with the short names of types
        # not by autodoc, which adds what eval_params is for each type of state
        parts.append(f".. py:function:: {name}{arguments} -> {result}\n")
        parts.append(indent(_docstring(app, value), "   ") + "\n")
    else:
        parts.append(f".. autodata:: gradxform.{name}\n   :no-value:\n")
    module = sources.public()[name]
    states = [] if inspect.isclass(value) else list(sources.tuples(module))
    states = [found for found in states if found.name.endswith(("State", "Info"))]
    if states:
        parts.append(title("State", "-"))
        parts.append("These are the fields that a training loop may read.\n")
    for found in states:
        parts.append(f".. rubric:: {found.name}\n\n{found.summary}\n")
        parts.append(_fields(found))
    return "\n".join(parts)


def _fields(found: sources.Tuple) -> str:
    rows = [(f"``{field.name}``", _meaning(field)) for field in found.fields]
    return table(("field", "meaning"), rows, "25 75")


def _meaning(field: sources.Field) -> str:
    if field.name == "info" and not field.meaning:
        return "Diagnostics: counters and what the last update did."
    return escaped(sentence(field.meaning))


def _types_page(app: Sphinx) -> str:
    parts = [
        title("Types in signatures"),
        "Signatures name these types. A number with a range may be a Python number, a scalar\n"
        "array or a traced array. Python numbers are checked when the method is built.\n",
    ]
    for target, users in sources.types().items():
        module, _, name = target.rpartition(".")
        definition = sources.definition(target)
        if not definition:
            text = indent(_docstring(app, getattr(import_module(module), name)), "   ")
            parts.append(f".. py:class:: {target}\n\n{text}\n")
            continue
        parts.append(f".. py:type:: {target}\n   :canonical: {definition}\n")
        value = getattr(import_module(module), name)
        parts += [f"   {text}\n" for text in (_range(value), sources.comment(target)) if text]
        if users and len(users) <= 8:
            links = ", ".join(f":func:`gradxform.{user}`" for user in sorted(users))
            parts.append(f"   Used by {links}.\n")
        elif users:
            parts.append(f"   Used by {len(users)} functions.\n")
    return "\n".join(parts)


def _range(value: Any) -> str:
    """What ``Annotated`` says of an alias, in words."""
    if value is Any:
        return "Any pytree: nested tuples, lists and dictionaries of arrays, or one array."
    if get_origin(value) is not Annotated:
        return ""
    base, *notes = get_args(value)
    interval = next((note for note in notes if isinstance(note, Interval)), None)
    words = [sentence(escaped(note)) for note in notes if isinstance(note, str)]
    if interval is not None:
        words.insert(0, _interval("A Python integer" if base is int else "A number", *interval))
    return " ".join(words)


def _interval(kind: str, low: float, high: float) -> str:
    least = "greater than 0" if 0 < low < 1e-30 else f"of at least {low:g}"
    if high == float("inf"):
        return f"{kind} {least}."
    is_closed = 0 < high - round(high) < 1e-6  # written a little above the largest number allowed
    most = f"at most {round(high)}" if is_closed else f"below {high:.10g}"
    return f"{kind} {least} and {most}."


def _info_page() -> str:
    parts = [
        title("What the methods report"),
        "Methods that count or measure something keep it in the ``info`` field of their state.\n"
        "Integers are totals over all updates. Floats describe the last update.\n",
        "The state of a method inside a chain is nested. ``state.info`` is then found in one of\n"
        "the links, for instance ``state[0].info``.\n",
    ]
    for module in dict.fromkeys(sources.public().values()):
        for found in sources.tuples(module):
            if found.is_diagnostics:
                users = [name for name, home in sources.public().items() if home == module]
                links = ", ".join(f":func:`gradxform.{name}`" for name in users)
                parts += [title(found.name, "-"), f"Reported by {links}.\n", _fields(found)]
    return "\n".join(parts)
