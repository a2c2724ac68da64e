"""Signatures and fields as they stand in the source: names of aliases, and shapes in quotes."""

import ast
import dataclasses
import inspect
import pkgutil
import re
import sys
import textwrap
from itertools import pairwise
from typing import Any, Literal, get_origin

from docutils import nodes
from sphinx.application import Sphinx

import vlae_jax


def signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, given: str | None, returns: str
) -> tuple[str | None, str | None]:
    """For `autodoc-process-signature`."""
    if what == "class" and getattr(obj, "_is_protocol", False):
        return "", None
    if what == "class" and issubclass(obj, tuple):
        # The fields follow, each with its type.
        return f"({', '.join(obj._fields)})", None
    if what == "class" and dataclasses.is_dataclass(obj):
        (tree,) = _parse(obj).body
        nodes = {node.target.id: node for node in tree.body if isinstance(node, ast.AnnAssign)}
        fields = [nodes[field.name] for field in dataclasses.fields(obj) if field.name in nodes]
        return f"({', '.join(_spell_field(field, obj) for field in fields)})", None
    function = obj.__init__ if what == "class" else obj
    if not inspect.isfunction(function):
        return given, returns
    (tree,) = _parse(function).body
    if what in ("class", "method"):
        tree.args.args.pop(0)
    for argument in [*tree.args.args, *tree.args.kwonlyargs]:
        if argument.annotation is not None:
            argument.annotation = _read(argument.annotation, function)
    result = None if what == "class" or tree.returns is None else _spell(tree.returns, function)
    return f"({ast.unparse(tree.args)})", result


_MANY = re.compile(r"(?<![\w*])\*(?=\w+(?![\w*]))")
_FIELDS: dict[str, list[str]] = {}
"""Docstrings of fields on their way around napoleon."""


def keep_field(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """For `autodoc-process-docstring`, before napoleon, which takes `this: that` for a type."""
    if what in ("attribute", "data"):
        _FIELDS[name] = lines[:]


def docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """For `autodoc-process-docstring`, after napoleon."""
    if what in ("attribute", "data"):
        lines[:] = _FIELDS.pop(name, lines)
    if lines and lines[0].startswith("Alias for field number"):
        lines.clear()  # a field of a NamedTuple that its name explains
    if what == "data" and name.rpartition(".")[2] in (*vlae_jax.__all__, *vlae_jax.APPLICATION):
        lines[:] = _alias(name.rpartition(".")[2])[1].splitlines()
    # In reStructuredText bars mean a substitution; here they are determinants and conditions. A
    # star before a name is no emphasis but many arguments.
    lines[:] = [_MANY.sub(r"\\*", line.replace("|", r"\|")) for line in lines]


def _alias(name: str) -> tuple[str, str]:
    """The value and the docstring of a type alias, from the room of the core that defines it."""
    for room in pkgutil.iter_modules(vlae_jax.__path__):
        module = sys.modules.get(f"vlae_jax.{room.name}")
        body = ast.parse(inspect.getsource(module)).body if module else []
        for node, below in pairwise(body):
            if isinstance(node, ast.Assign) and node.targets[0].id == name:
                return _spell(node.value, module), inspect.cleandoc(below.value.value)
    raise LookupError(name)


def _parse(obj: Any) -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(obj)))


def _spell(annotation: ast.expr, owner: Any) -> str:
    return ast.unparse(_read(annotation, owner))


def _spell_field(field: ast.AnnAssign, owner: Any) -> str:
    default = "" if field.value is None else f" = {ast.unparse(field.value)}"
    return f"{ast.unparse(field.target)}: {_spell(field.annotation, owner)}{default}"


def _read(annotation: ast.expr, owner: Any) -> ast.expr:
    names = vars(inspect.getmodule(owner))
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body  # a class not yet imported
    return ast.fix_missing_locations(_Reader(names).visit(annotation))


class _Reader(ast.NodeTransformer):
    """An annotation with the alternatives of a `Literal` spelled out and shapes unpadded."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.expr:
        meant = self.names.get(node.id)
        if get_origin(meant) is not Literal:
            return node
        return ast.parse(f"Literal[{', '.join(map(repr, meant.__args__))}]", mode="eval").body

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return ast.Constant(node.value.strip()) if isinstance(node.value, str) else node


def tidy(app: Sphinx, document: nodes.document) -> None:
    """For `doctree-read`: types that were evaluated, put back as they were written."""
    for text in list(document.findall(nodes.Text)):
        if text == "jaxlib._jax.Array":
            text.parent.replace(text, nodes.Text("Array"))
    for paragraph in list(document.findall(nodes.paragraph)):
        if paragraph.astext().startswith("alias of "):
            value, _ = _alias(paragraph.parent.parent[0]["fullname"])
            paragraph[:] = [nodes.Text("Stands for "), nodes.literal(text=value), nodes.Text(".")]


def skip(app: Sphinx, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """For `autodoc-skip-member`: what a room imports, some of which Sphinx 9.2 cannot even read."""
    foreign = what == "module" and not getattr(obj, "__module__", "vlae_jax").startswith("vlae_jax")
    return True if foreign else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect them to autodoc and to the reader."""
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-process-docstring", keep_field, priority=400)
    app.connect("autodoc-process-docstring", docstring, priority=600)
    app.connect("autodoc-skip-member", skip)
    app.connect("doctree-read", tidy)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
