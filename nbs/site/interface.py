"""The library's public interface, read from the notebooks' source: nothing is imported for it."""

import ast
import copy
import re


def definitions(source):
    "The public functions and classes of a cell, by name."
    return {
        node.name: node
        for node in ast.parse(source).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
    }


def methods(node):
    "The documented public methods of a class."
    return (
        [
            m
            for m in getattr(node, "body", [])
            if isinstance(m, ast.FunctionDef)
            and ast.get_docstring(m)
            and not m.name.startswith("_")
        ]
        if is_class(node)
        else []
    )


def bound_properties(node):
    "The public properties that a class binds to functions: {name: its assignment}."
    return {
        line.targets[0].id: line
        for line in (node.body if is_class(node) else [])
        if isinstance(line, ast.Assign)
        and isinstance(line.value, ast.Call)
        and ast.unparse(line.value.func) == "property"
        and not line.targets[0].id.startswith("_")
    }


def members(node):
    "The names of what a class has an entry for: its methods and properties."
    return [*(method.name for method in methods(node)), *bound_properties(node)]


def is_class(node):
    return isinstance(node, ast.ClassDef)


def symbols(notebooks):
    """Where each public name is explained: {name: (module, page)}.

    `notebooks` are triples (default module, page, notebook); a cell may export to another module."""
    found = {}
    for default, page, notebook in notebooks:
        for cell in notebook.cells:
            mark = re.search(r"^#\| *exports? *([\w.]*)", cell.source, re.M)
            if cell.cell_type != "code" or not mark:
                continue
            module = mark.group(1) or default
            for name, node in definitions(cell.source).items():
                for full in (name, *(f"{name}.{member}" for member in members(node))):
                    found.setdefault(full, (module, page))
    return found


def arguments(node):
    "What one calls a function or a class with: `ast.arg` or field → its default, or None."
    if is_class(node):
        init = [
            m
            for m in node.body
            if isinstance(m, ast.FunctionDef) and m.name == "__init__"
        ]
        if init:
            return arguments(init[0])
        return {f: f.value for f in node.body if isinstance(f, ast.AnnAssign)}
    a = node.args
    plain = a.posonlyargs + a.args
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    every = {**dict(zip(plain, defaults)), **dict(zip(a.kwonlyargs, a.kw_defaults))}
    return {
        arg: default for arg, default in every.items() if arg.arg not in ("self", "cls")
    }


def _shown_default(value):
    "A default that is a value; what a call makes is left to the table."
    return "..." if isinstance(value, ast.Call) else ast.unparse(value)


def signature(node):
    "The arguments without their types, which the table has."
    if is_class(node) and not any(
        getattr(m, "name", "") == "__init__" for m in node.body
    ):
        return ", ".join(
            f.target.id + (f"={_shown_default(f.value)}" if f.value else "")
            for f in arguments(node)
        )
    if is_class(node):
        node = next(m for m in node.body if getattr(m, "name", "") == "__init__")
    args = copy.deepcopy(node.args)
    for arg in ast.walk(args):
        if isinstance(arg, ast.arg):
            arg.annotation = None
    if args.args and args.args[0].arg in ("self", "cls"):
        del args.args[0]
    return ast.unparse(args)


def docment(lines, node):
    "The comment behind a parameter, or the comment lines above it."
    behind = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
    if found := re.match(r"[^#)\"']*# *(.+)", behind):
        return found.group(1)
    above = []
    for line in reversed(lines[: node.lineno - 1]):
        if not (found := re.match(r" *# *(.+)", line)):
            break
        above.insert(0, found.group(1))
    return " ".join(above)


def escaped(text):
    "Plain text as Markdown; what stands between backticks stays code."
    parts = text.split("`")
    parts[::2] = [re.sub(r"([\\*_\[\]<|$~])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def docstring(node):
    "A docstring as Markdown: code between backticks, and titles between asterisks."
    text = escaped(ast.get_docstring(node) or "")
    title = r"(?<![\w*\\])\\\*(\w[^*`]*\w)\\\*(?![\w*])"
    return re.sub(title, r"*\1*", text)


def code(text):
    return f"`{text}`".replace("|", r"\|") if text else ""


def table(node, source):
    "The docments of a function or class; nothing where no parameter has one."
    lines, text = source.splitlines(), lambda part: ast.unparse(part) if part else ""
    rows = [
        (
            getattr(arg, "arg", None) or arg.target.id,
            text(arg.annotation),
            text(default),
            docment(lines, default or arg),
        )
        for arg, default in arguments(node).items()
    ]
    if not any(row[3] for row in rows):
        return ""
    if getattr(node, "returns", None):
        rows.append(("returns", text(node.returns), "", docment(lines, node.returns)))
    rows = [
        (
            name if name == "returns" else code(name),
            code(kind),
            code(default),
            escaped(about),
        )
        for name, kind, default, about in rows
    ]
    heads = ("name", "type", "default", "meaning")
    used = [
        i for i, column in enumerate(zip(*rows)) if any(column)
    ]  # as nbdev: no empty column
    cells = [heads, ["---"] * 4, *rows]
    return "\n".join("| " + " | ".join(row[i] for i in used) + " |" for row in cells)


def property_entry(name, assignment, source, module, owner):
    "The entry of a property that a class binds to a function: the comment behind it."
    comment = docment(source.splitlines(), assignment)
    return "\n".join(
        [
            f":::{{py:property}} {owner}.{name}",
            f":module: {module}",
            "",
            escaped(comment),
            ":::",
        ]
    )


def entry(node, source, module, owner=""):
    "The entry of a function or class: signature, docstring, docments, and its methods in it."
    kind = "class" if is_class(node) else "method" if owner else "function"
    decorators = {ast.unparse(d) for d in node.decorator_list}
    options = [f":module: {module}"]
    if owner:
        options += [
            f":{d}:" for d in ("classmethod", "staticmethod") if d in decorators
        ]
    call = "" if "property" in decorators else f"({signature(node)})"
    if call == "" and owner:
        kind = "property"
    inside = [
        docstring(node),
        table(node, source),
        *(entry(m, source, module, node.name) for m in methods(node)),
        *(
            property_entry(name, assignment, source, module, node.name)
            for name, assignment in bound_properties(node).items()
        ),
    ]
    fence = ":::" if owner else "::::"
    name = f"{owner}.{node.name}" if owner else node.name
    return "\n".join(
        [
            f"{fence}{{py:{kind}}} {name}{call}",
            *options,
            "",
            "\n\n".join(filter(None, inside)),
            fence,
        ]
    )
