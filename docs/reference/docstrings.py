"""Lays out ngd_dist's docstrings, which are prose, as Markdown for the reference pages."""

import re

from griffe import Alias, Extension, GriffeLoader, Module, Object

ARGUMENT = re.compile(r"^([a-z_]\w*): ")
PROMISE = re.compile(r"^(Collective|Raises)([.:])")
CODE = re.compile(r"(`[^`]*`)")


class Docstrings(Extension):
    """Gives each docstring of a package the line breaks that Markdown needs."""

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **_: object) -> None:
        self._lay_out(pkg)

    def _lay_out(self, part: Object | Alias) -> None:
        if part.docstring:
            part.docstring.value = as_markdown(part.docstring.value)
        for name, member in list(part.members.items()):
            if not member.is_alias:
                self._lay_out(member)
            elif part.is_package or part.is_subpackage:
                part.del_member(name)  # shown where it is defined


def as_markdown(text: str) -> str:
    """Returns the docstring with arguments as a list, "Collective" and "Raises" as paragraphs, the rest as code."""
    return "\n\n".join(_paragraph(paragraph) for paragraph in text.split("\n\n"))


def _paragraph(text: str) -> str:
    if text.startswith(">>> "):
        return f"```pycon\n{text}\n```"
    return f"```text\n{text}\n```" if "\n+-- " in text else _prose(text)


def _prose(paragraph: str) -> str:
    lines: list[str] = []
    for line in paragraph.split("\n"):
        line = "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in CODE.split(line))
        if promise := PROMISE.match(line):
            lines += ["", f"**{promise[1]}**{promise[2]}{line[promise.end() :]}"]
        elif argument := ARGUMENT.match(line):
            lines += ["", f"- `{argument[1]}`: {line[argument.end() :]}"]
        else:
            lines.append(line)
    return "\n".join(lines)
