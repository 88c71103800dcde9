"""Makes local-bigquery 0.4.0, written for Python 3.13, run on Python 3.11.

Two files use newer syntax: the generic functions of PEP 695, and an f-string with the same quotes
inside. Each replacement must fit exactly once, so that another release is noticed.
"""

import pathlib
import sys

GENERICS = [
    (
        "from local_bigquery.resource import Resource\n",
        "from local_bigquery.resource import Resource\n\nfrom typing import TypeVar\n\nR = TypeVar('R', bound=Resource)\n",
    ),
    ("def list_[R: Resource](", "def list_("),
    ("def load[R: Resource](", "def load("),
    ("def save[R: Resource](", "def save("),
]
QUOTES = [
    (
        """    message = f"Array cannot have a null element; error in writing field {column}"\n""",
        """    message = f"Array cannot have a null element; error in writing field {column}"\n"""
        """    message = message.replace("'", "''")\n""",
    ),
    ("""{message.replace("'", "''")}') ELSE""", """{message}') ELSE"""),
]


def mend(file, replacements):
    text = file.read_text()
    for old, new in replacements:
        if text.count(old) != 1:
            sys.exit(f"{file}: expected once: {old!r}")
        text = text.replace(old, new)
    file.write_text(text)


package = pathlib.Path(sys.argv[1])
mend(package / "catalog" / "metadata.py", GENERICS)
mend(package / "engine" / "results.py", QUOTES)
