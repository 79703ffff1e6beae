"""English about Python, collected from the running interpreter's installation with nothing but the standard library.

Four kinds of text: the documentation topics behind ``help()``, the docstrings and block comments of the standard
library's source files, the docstrings of its compiled modules, and the licence. What is collected depends on the
interpreter's version and build alone, never on its location, on dictionary order or on installed packages.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import io
import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "ensurepip", "idlelib", "lib-dynload", "pydoc_data", "site-packages", "test", "tests", "turtledemo"}
)
SKIPPED_MODULES = re.compile(
    r"_?_?(test|xx|phello|hello|ctypes_test|sysconfigdata|idlelib|lib2to3|pydoc_data|antigravity|this)"
)
RULE = re.compile(r"^[ \t]*([=*~^\"'#+._-])\1{3,}[ \t]*$", re.MULTILINE)
SHINGLE_WORDS = 8
SEEN_SHARE = 0.4
MIN_COMMENT_CHARS = 100
CHAT_SHARE = 0.35


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text that stands for itself, and the source it came from; documents of one source are never split apart."""

    source: str
    title: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Documents to learn from and documents to be judged by, without a source or a longer passage in common."""

    train: tuple[Document, ...]
    heldout: tuple[Document, ...]


def share(key: str, seed: int) -> float:
    """Return a number in [0, 1) that depends on the key and the seed alone."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def normalise(text: str) -> str:
    """Return a text without its indentation, rules of punctuation, trailing blanks and runs of empty lines."""
    text = inspect.cleandoc(text.expandtabs(4).replace("\f", "").replace("\r", ""))
    text = RULE.sub("", text)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def topic_documents() -> Iterator[Document]:
    """Yield the topics of ``help()``; none where the installation left them out."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name in sorted(topics):
        yield Document(source=f"topic {name}", title=name, text=normalise(topics[name]))


def licence_documents(stdlib: Path) -> Iterator[Document]:
    """Yield the licence, where the installation keeps it beside the library."""
    path = stdlib / "LICENSE.txt"
    if path.is_file():
        yield Document(source="licence", title="the Python licence", text=normalise(path.read_text("utf-8")))


def comment_blocks(source: str) -> dict[int, str]:
    """Return the block comments that read like prose, by the number of their first line."""
    blocks: dict[int, list[str]] = {}
    first, last = 0, -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or token.line[: token.start[1]].strip():
            continue
        line = token.start[0]
        if line != last + 1:
            first = line
        blocks.setdefault(first, []).append(token.string.lstrip("#!:").removeprefix(" "))
        last = line
    texts = {line: normalise("\n".join(lines)) for line, lines in blocks.items()}
    return {line: text for line, text in texts.items() if is_prose(text)}


def is_prose(text: str) -> bool:
    """Tell whether a comment is long enough and made of words, rather than commented-out code or a drawing."""
    letters = sum(character.isalpha() or character == " " for character in text)
    return len(text) >= MIN_COMMENT_CHARS and letters > 0.85 * len(text)


def signature(node: ast.AST) -> str:
    """Return the head of a definition: its name, and its parameters without their annotations."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            arguments = node.args
            for argument in ast.walk(arguments):
                if isinstance(argument, ast.arg):
                    argument.annotation = None
            return f"{name}({ast.unparse(arguments)})"
        case ast.ClassDef(name=name):
            return f"class {name}"
        case _:
            return ""


def definition_texts(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield the signature and the docstring of a definition and of all that is defined inside it."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        documentation = ast.get_docstring(node)
        if documentation:
            yield signature(node), normalise(documentation)
    for child in ast.iter_child_nodes(node):
        yield from definition_texts(child)


def definition_document(name: str, node: ast.AST) -> Document | None:
    """Return the docstrings of a top-level definition as one document, or None where there are none."""
    texts = list(definition_texts(node))
    if not texts:
        return None
    head = signature(node)
    if texts[0][0] == head:
        inner = [f"{below}\n\n{text}" for below, text in texts[1:]]
        return Document(source=name, title=titled(name, head), text="\n\n".join([texts[0][1], *inner]))
    return Document(source=name, title=titled(name, head), text="\n\n".join("\n\n".join(pair) for pair in texts))


def titled(name: str, head: str) -> str:
    """Return a signature with the name of its module in front, whether of a class or of a function."""
    return f"class {name}.{head.removeprefix('class ')}" if head.startswith("class ") else f"{name}.{head}"


def source_documents(name: str, source: str) -> Iterator[Document]:
    """Yield a module's docstring, its definitions' docstrings and its block comments, in the order of the file.

    Raises:
        SyntaxError: the source is not Python.
    """
    tree = ast.parse(source)
    found: list[tuple[int, Document]] = []
    documentation = ast.get_docstring(tree)
    if documentation:
        found.append((0, Document(source=name, title=f"the {name} module", text=normalise(documentation))))
    for node in tree.body:
        document = definition_document(name, node)
        if document:
            found.append((node.lineno, document))
    for line, text in comment_blocks(source).items():
        found.append((line, Document(source=name, title="", text=text)))
    for _, document in sorted(found, key=lambda item: item[0]):
        yield document


def library_documents(stdlib: Path) -> Iterator[Document]:
    """Yield the documents of every source file of the standard library, without its tests and installed packages."""
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts) and not SKIPPED_MODULES.match(relative.parts[0]):
            name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
            with tokenize.open(path) as file:
                yield from source_documents(name, file.read())


def compiled_modules() -> Iterator[ModuleType]:
    """Yield the modules of the standard library that are written in C, as far as this installation has them."""
    for name in sorted(sys.stdlib_module_names):
        if SKIPPED_MODULES.match(name):
            continue
        spec = importlib.util.find_spec(name)
        if spec and spec.origin and not spec.origin.endswith(".py") and spec.origin != "frozen":
            try:
                yield importlib.import_module(name)
            except ImportError:
                continue


def compiled_text(value: object) -> str:
    """Return the docstrings of a compiled function, or of a class and of its own methods."""
    documentation = getattr(value, "__doc__", None)
    parts = [normalise(documentation)] if isinstance(documentation, str) and documentation.strip() else []
    if inspect.isclass(value):
        for key, member in sorted(vars(value).items()):
            text = getattr(member, "__doc__", None)
            if not inspect.isclass(member) and callable(member) and isinstance(text, str):
                parts.append(f"{key}\n\n{normalise(text)}")
    return "\n\n".join(parts)


def compiled_documents(module: ModuleType) -> Iterator[Document]:
    """Yield the docstrings of a compiled module and of the functions and classes it defines."""
    name = module.__name__
    if module.__doc__:
        yield Document(source=name, title=f"the {name} module", text=normalise(module.__doc__))
    for key, value in sorted(vars(module).items()):
        documented = inspect.isclass(value) or inspect.isroutine(value)
        if documented and not key.startswith("__") and getattr(value, "__module__", name) in (name, "builtins", None):
            text = compiled_text(value)
            if text:
                title = f"{name}.{key}".removeprefix("builtins.")
                title = f"class {title}" if inspect.isclass(value) else title
                yield Document(source=f"{name}.{key}", title=title, text=text)


def shingles(paragraph: str) -> set[int]:
    """Return hashes of a paragraph's runs of eight words, case and punctuation aside; of all of it where shorter."""
    words = re.findall(r"\w+", paragraph.lower())
    runs = [" ".join(words[start : start + SHINGLE_WORDS]) for start in range(max(1, len(words) - SHINGLE_WORDS + 1))]
    return {int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest()) for run in runs}


def without_repeats(documents: Iterable[Document]) -> Iterator[Document]:
    """Yield the documents without the paragraphs that an earlier one had, word by word or nearly."""
    seen: set[int] = set()
    for document in documents:
        kept: list[str] = []
        for paragraph in document.text.split("\n\n"):
            hashes = shingles(paragraph)
            if len(hashes & seen) <= SEEN_SHARE * len(hashes):
                kept.append(paragraph)
            seen |= hashes
        text = "\n\n".join(kept).strip()
        if len(text.split()) >= 5:
            yield replace(document, text=text)


def chat_text(question: str, answer: str) -> str:
    """Return a question and its answer in the form of the tokenizer's chat template."""
    return f"User: {question}\nAssistant: {answer}"


def rendered(document: Document, seed: int) -> Document:
    """Return a document as it is learned: some as the answer to a question, the rest below their title."""
    if not document.title:
        return document
    if share(document.text, seed) < CHAT_SHARE:
        text = chat_text(f"What is {document.title.partition('(')[0].removeprefix('class ')}?", document.text)
    else:
        text = f"{document.title}\n\n{document.text}"
    return replace(document, text=text)


def collect(*, seed: int, heldout_share: float) -> Corpus:
    """Return this installation's text, split by source: the same for the same Python version, seed and share."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    found = [*topic_documents(), *licence_documents(stdlib), *library_documents(stdlib)]
    found += [document for module in compiled_modules() for document in compiled_documents(module)]
    documents = [rendered(document, seed) for document in without_repeats(found)]
    heldout = [share(document.source, seed) < heldout_share for document in documents]
    return Corpus(
        train=tuple(document for document, out in zip(documents, heldout, strict=True) if not out),
        heldout=tuple(document for document, out in zip(documents, heldout, strict=True) if out),
    )
