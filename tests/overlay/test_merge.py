"""The merge, rule by rule, as source before and after."""

from textwrap import dedent, indent

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version

from vllm_deepstack.cli import UserError
from vllm_deepstack.merge.merge import added, is_needed, merge

PATH = "vllm/model_executor/models/tower.py"
BASE = "vllm/model_executor/models/base.py"
FORK = {BASE: b"class Staging:\n    def get(self): ...\n    def clear(self): ...\n"}


def code(text: str) -> str:
    return dedent(text).lstrip("\n")


def merged(before: str, overlay: str, release: str = "0.22.1") -> str:
    def step(theirs: bytes) -> bytes:
        files = FORK | {PATH: code(overlay).encode()}
        return merge(files[PATH], theirs, path=PATH, release=Version(release), overlay=files)

    once = step(code(before).encode())
    assert step(once) == once, "merging what is merged changes something"
    return once.decode()


def check(before: str, overlay: str, after: str, release: str = "0.22.1") -> None:
    assert merged(before, overlay, release) == code(after)


def fails(before: str, overlay: str, *words: str, release: str = "0.22.1") -> None:
    with pytest.raises(UserError) as error:
        merged(before, overlay, release)
    for word in (PATH, release, *words):
        assert word in str(error.value)


class TestImports:
    def test_missing_import_goes_among_its_package_in_order(self):
        check(
            """
            import os

            from vllm.sequence import IntermediateTensors

            from .interfaces import SupportsPP
            from .utils import maybe_prefix
            """,
            "from .base import Staging\nfrom .tail import Tail\nfrom vllm.envs import FLAG\n",
            """
            import os

            from vllm.envs import FLAG
            from vllm.sequence import IntermediateTensors

            from .base import Staging
            from .interfaces import SupportsPP
            from .tail import Tail
            from .utils import maybe_prefix
            """,
        )

    def test_import_of_a_new_package_goes_last(self):
        check("import os\n\nX = 1\n", "import torch\n", "import os\nimport torch\n\nX = 1\n")

    def test_import_goes_after_the_docstring_where_there_are_no_others(self):
        check('"""Theirs."""\nX = 1\n', "import torch\n", '"""Theirs."""\nimport torch\nX = 1\n')

    def test_only_the_missing_names_are_imported(self):
        check(
            "from .base import (\n    Other,  # kept\n)\n",
            "from .base import Other, Staging\n",
            "from .base import (\n    Other,  # kept\n)\nfrom .base import Staging\n",
        )

    def test_present_import_changes_nothing(self):
        check(
            "from .base import Staging  # why\n",
            "from .base import Staging\n",
            "from .base import Staging  # why\n",
        )

    def test_name_with_another_meaning_is_an_error(self):
        fails(
            "from .elsewhere import Staging\n",
            "from .base import Staging\n",
            "Staging is something else",
        )

    @pytest.mark.parametrize(
        "theirs",
        [
            "import os.path as torch",
            "a, torch = 1, 2",
            "a = torch = 1",
            "if a:\n    import torch",
            "try:\n    import torch\nexcept ImportError:\n    torch = None",
            "for torch in []:\n    pass",
        ],
    )
    def test_name_that_upstream_binds_in_another_way_is_an_error(self, theirs):
        line = theirs.partition("\n")[0]
        fails(f"{theirs}\n", "import torch\n", f"torch is something else upstream: `{line}`")

    @pytest.mark.parametrize(
        "overlay, merged",
        [
            ("class A(tail.B): ...", "class A(tail.B):\n    x = 1"),
            ("@tail.cached\ndef f(): pass\nclass A: ...", None),
            ("X = tail.X\nclass A: ...", "X = tail.X\nclass A:\n    x = 1"),
        ],
    )
    def test_import_goes_above_its_first_use(self, overlay, merged):
        """Though `tail` sorts below `last`."""
        merged = merged or "\n\n@tail.cached\ndef f(): pass\nclass A:\n    x = 1"
        check(
            "import os\nclass A:\n    x = 1\nfrom . import last\nprint(A)\n",
            f"from . import tail\n{overlay}\n",
            f"import os\nfrom . import tail\n{merged}\nfrom . import last\nprint(A)\n",
        )

    def test_star_is_an_error(self):
        fails("import os\n", "from .base import *\n", "from .base import *")


class TestDefinitions:
    def test_new_definition_goes_before_the_one_that_follows_it_in_the_overlay(self):
        check(
            """
            A = 1


            def f():
                return A
            """,
            """
            B = 2


            def g():
                return B


            def f():
                return g()


            def h():
                pass
            """,
            """
            A = 1
            B = 2


            def g():
                return B


            def f():
                return g()


            def h():
                pass
            """,
        )

    def test_definition_is_replaced_and_the_rest_stays_byte_for_byte(self):
        check(
            """
            LIMIT=1 # odd   spacing

            # about f
            @cache
            def f( x ):
                return x

            T = { 'a' :1 }
            """,
            """
            # ours
            def f(x):
                return -x


            LIMIT = 2
            """,
            """
            LIMIT = 2

            # ours
            def f(x):
                return -x

            T = { 'a' :1 }
            """,
        )

    def test_equal_definition_keeps_upstreams_layout(self):
        before = "def f( x ):\n    return x  # so\n"
        check(before, "def f(x):\n    return x\n", before)

    def test_windows_line_ends_stay(self):
        ours = b"def f():\n    return 2\n"
        after = merge(
            ours,
            b"X = 1\r\n\r\n\r\ndef f():\r\n    return 1\r\n",
            path=PATH,
            release=Version("1"),
            overlay={},
        )
        assert after == b"X = 1\r\n\r\n\r\ndef f():\r\n    return 2\r\n"

    def test_docstrings_of_the_overlay_do_not_land(self):
        check(
            '"""Theirs."""\nclass A:\n    x = 1\n',
            '"""Ours."""\nclass A:\n    """Ours."""\n',
            '"""Theirs."""\nclass A:\n    x = 1\n',
        )

    @pytest.mark.parametrize(
        "overlay, words",
        [
            ("print(1)\n", ["print(1)", "not a definition"]),
            ("if True:\n    x = 1\n", ["not a definition"]),
            ("class A:\n    print(1)\n", ["A", "print(1)"]),
            ("def f(:\n", ["overlay's file", "does not parse"]),
            ("def A(): ...\n", ["A", "another kind"]),
        ],
    )
    def test_what_is_no_definition_is_an_error(self, overlay, words):
        fails("class A:\n    pass\n", overlay, *words)

    def test_definition_that_upstream_imports_is_an_error(self):
        fails("from .utils import f\n", "def f():\n    return 1\n", "f", "imports it")

    @pytest.mark.parametrize(
        "theirs",
        [
            "f, g = 1, 2",
            "f = g = 1",
            "if True:\n    def f(): pass",
            "try:\n    from a import f\nexcept ImportError:\n    f = None",
            "for f in []:\n    pass",
            "with a as f:\n    pass",
            "if True:\n    class f: pass",
        ],
    )
    @pytest.mark.parametrize("ours", ["f = 1", "def f(): pass", "class f(B):\n    x = 1"])
    def test_definition_that_upstream_has_in_another_way_is_an_error(self, theirs, ours):
        words = ["f", f"upstream defines it in another way: `{theirs.partition(chr(10))[0]}`"]
        fails(f"{theirs}\n", f"{ours}\n", *words)
        theirs, ours = indent(theirs, "    "), indent(ours, "    ")
        fails(f"class A:\n{theirs}\n", f"class A:\n{ours}\n", "A.f", *words[1:])
        fails(f"class A:\n{theirs}\n    def f(): pass\n", f"class A:\n{ours}\n", "A.f", "2 times")

    def test_names_inside_of_upstreams_functions_are_others(self):
        before = "if a:\n    def g(f, x): f = [f for f in x]\nx.f = f\n"
        check(before, "f = 1\n", f"{before}f = 1\n")

    def test_ambiguous_definition_is_an_error(self):
        fails("def f(): pass\ndef f(): pass\n", "def f():\n    return 1\n", "f", "2 times")

    def test_upstream_that_does_not_parse_is_an_error(self):
        fails("def f(:\n", "x = 1\n", "upstream's file")


CLASS = """
from .base import Other


class Model(
    Module,
    SupportsPP,
):
    size = 1

    def __init__(self):
        self.x = 1  # as it is

    def get(self):
        return self.x

    @property
    def width(self): return 3

    def clear(self):
        self.x = 0
"""


class TestClasses:
    def test_base_of_the_fork_takes_its_methods_over(self):
        check(
            CLASS,
            "from .base import Staging\n\n\nclass Model(Staging): ...\n",
            """
from .base import Other
from .base import Staging


class Model(
    Staging,
    Module,
    SupportsPP,
):
    size = 1

    def __init__(self):
        self.x = 1  # as it is

    @property
    def width(self): return 3
""",
        )

    def test_base_of_the_fork_is_found_by_its_absolute_name_too(self):
        after = merged(
            CLASS,
            "from vllm.model_executor.models.base import Staging\nclass Model(Staging): ...\n",
        )
        assert "def get" not in after

    def test_what_shadows_the_base_and_is_no_method_is_an_error(self):
        fails(
            CLASS.replace("size = 1", "size, get = 1, None"),
            "from .base import Staging\n\n\nclass Model(Staging): ...\n",
            "Model.get",
            "another way: `size, get = 1, None`",
        )

    def test_other_base_takes_nothing_over(self):
        after = merged(CLASS, "from .other import Staging\nclass Model(Staging): ...\n")
        assert "def get" in after

    def test_overlays_own_method_wins_over_the_base(self):
        after = merged(
            CLASS,
            """
            from .base import Staging


            class Model(Staging):
                def get(self):
                    return 2
            """,
        )
        assert "return 2" in after and "return self.x" not in after and "def clear" not in after

    @pytest.mark.parametrize(
        "header, after",
        [
            ("class A:", "class A(B):"),
            ("class A():", "class A(B):"),
            ("class A(C):", "class A(B, C):"),
            ("class A(metaclass=M):", "class A(B, metaclass=M):"),
            ("class A(B):", "class A(B):"),
            ("class A(C, B):", "class A(C, B):"),
        ],
    )
    def test_missing_base_comes_first(self, header, after):
        check(f"{header}\n    x = 1\n", "class A(B): ...\n", f"{after}\n    x = 1\n")

    def test_methods_and_attributes_are_added_and_replaced(self):
        check(
            """
            class A:
                size = 1

                def f(self):
                    return 1
            """,
            """
            class A:
                size = 2
                def new(self):
                    return 0
                def f(self):
                    return 2
                def last(self): pass
            """,
            """
            class A:
                size = 2

                def new(self):
                    return 0

                def f(self):
                    return 2

                def last(self): pass
            """,
        )

    def test_class_that_upstream_lacks_is_added(self):
        check("x = 1\n", "class A:\n    y = 2\n", "x = 1\n\n\nclass A:\n    y = 2\n")

    def test_class_that_should_be_upstreams_and_is_not_is_an_error(self):
        fails("x = 1\n", "class Model(Base): ...\n", "Model", "no such definition")

    def test_decorators_and_keywords_are_an_error(self):
        fails(CLASS, "@final\nclass Model: ...\n", "Model", "decorators")

    def test_class_left_empty_passes(self):
        check(
            "from .base import Staging\nclass A:\n    def get(self): return 1\n",
            "from .base import Staging\nclass A(Staging): ...\n",
            "from .base import Staging\nclass A(Staging):\n    pass\n",
        )


METHOD = '''
class A:
    def f(self, x: int, *, y=2) -> int:
        """Theirs."""
        a = x  # first

        b = a + y
        c = b
        return c
'''


class TestSplice:
    def test_before_and_after(self):
        check(
            METHOD,
            '''
            class A:
                def f(self, x, *, y=2):
                    """Ours."""
                    # why
                    start()
                    ...
                    end()
            ''',
            METHOD.replace("        a = x", "        # why\n        start()\n        a = x")
            + "        end()\n",
        )

    def test_anchor_splits_upstreams_statements(self):
        check(
            METHOD,
            """
            class A:
                def f(self, x, *, y=2):
                    ...
                    b = a+y  # anchor
                    between()
                    ...
            """,
            METHOD.replace("b = a + y\n", "b = a + y\n        between()\n"),
        )

    def test_two_anchors(self):
        check(
            METHOD,
            """
            class A:
                def f(self, x, *, y=2):
                    ...
                    one()
                    b = a + y  # anchor
                    ...
                    two()
                    return c  # anchor
            """,
            METHOD.replace("\n        b =", "        one()\n\n        b =").replace(
                "        return", "        two()\n        return"
            ),
        )

    def test_function_of_the_module(self):
        check(
            "def f(x): return x\n",
            "def f(x):\n    log(x)\n    ...\n",
            "def f(x):\n    log(x)\n    return x\n",
        )

    @pytest.mark.parametrize(
        "body, words",
        [
            ("...\nb = a - y  # anchor\nnew()\n...", ["A.f", "upstream has no `b = a - y`"]),
            ("b = a - y  # anchor\nnew()\n...", ["A.f", "upstream has no `b = a - y`"]),
            ("...\nnew()\nreturn b  # anchor", ["A.f", "upstream has no `return b`"]),
            ("...\n# anchor\nreturn b\nnew()", ["A.f", "upstream has no `return b`"]),
            ("...\nnew()\n...", ["A.f", "between two", "`new()`"]),
            ("...\na = x  # anchor\nreturn c  # anchor\n...", ["A.f", "other statements"]),
            ("b = a + y  # anchor\nnew()\n...", ["A.f", "other statements"]),
            ("...\nc = b  # anchor\n...\nb = a + y  # anchor\n...", ["A.f", "another order"]),
            ("...\nb = a + y\nnew()\n...", ["A.f", "`b = a + y`", "mark it `# anchor`"]),
            ("...\nnew()\nreturn c", ["A.f", "`return c`", "mark it `# anchor`"]),
        ],
    )
    def test_anchor_that_does_not_fit_is_an_error(self, body, words):
        lines = "".join(f"        {line}\n" for line in body.splitlines())
        fails(METHOD, f"class A:\n    def f(self, x, *, y=2):\n{lines}", *words)

    def test_ambiguous_anchor_is_an_error(self):
        fails(
            "def f():\n    g()\n    h()\n    g()\n",
            "def f():\n    ...\n    g()  # anchor\n    new()\n    ...\n",
            "`g()` 2 times",
        )

    def test_mark_at_the_end_of_the_first_line_or_above(self):
        """Upstream's text stays; what is not marked has a comment of its own."""
        check(
            """
            def f(x):
                a = g(x)  # theirs
                if a:
                    h(a)
                try:
                    b = g(
                        a
                    )
                finally:
                    h(a)
                return b
            """,
            """
            def f(x):
                ...
                a = g(  # anchor: g is pure
                    x
                )
                new()  # anchors are above
                if a:  # anchor
                    h(a)
                new(a)
                # anchor
                try:
                    b = g(a)
                finally:
                    h(a)
                new(b)
                return b  # anchor # noqa
            """,
            """
            def f(x):
                a = g(x)  # theirs
                new()  # anchors are above
                if a:
                    h(a)
                new(a)
                try:
                    b = g(
                        a
                    )
                finally:
                    h(a)
                new(b)
                return b
            """,
        )

    def test_anchors_without_an_ellipsis_name_all_of_upstreams_statements(self):
        overlay = "def f():\n    a()  # anchor\n    new()\n    b()  # anchor\n"
        check("def f():\n    a()\n    b()\n", overlay, "def f():\n    a()\n    new()\n    b()\n")
        fails("def f():\n    a()\n    b()\n    c()\n", overlay, "other statements")

    def test_block_without_an_ellipsis_is_upstreams(self):
        fails(
            "def f(x):\n    if x:\n        a()\n    else:\n        b()\n",
            "def f(x):\n    if x:\n        ...\n        new()\n    else:\n        c()\n    ...\n",
            "`c()` is not marked",
        )

    NEW = [
        "try:\n    ...\n    new()\nexcept E:\n    pass",
        "match x:\n    case 1:\n        ...\n        new()",
        "with x:\n    try:\n        ...\n    finally:\n        new()",
        "try:\n    def g():\n        ...\nfinally:\n    pass",
        "new(); ...",
        "try:\n    a = x  # anchor\nfinally:\n    new()",
        "try:\n    # remove: g\n    a = x\nfinally:\n    new()",
        "new(\n    x,\n)  # anchor",
    ]

    @pytest.mark.parametrize("new", NEW)
    @pytest.mark.parametrize("overlay", ["f(x):\n    ...\n", "f(x):\n", "g(x):\n"])
    def test_what_stands_for_upstreams_code_in_new_code_is_an_error(self, new, overlay):
        """In a spliced, a replaced and an added function."""
        new = indent(new, "    ")
        fails("def f(x):\n    a = x\n", f"def {overlay}{new}\n", overlay[0], "in `", "to stand for")

    def test_ellipsis_in_an_added_class_is_an_error(self):
        overlay = "class A:\n    def f(self):\n        ...\n"
        fails("x = 1\n", overlay, "A", "`...` in `class A:`")

    def test_ellipsis_as_a_value_and_upstreams_own_stay(self):
        check(
            """
            @overload
            def g(x: int): ...


            def f(x):
                try:
                    ...
                finally:
                    a(x)
            """,
            """
            T: tuple[int, ...] = ...


            def f(x):
                new(x[...], ..., lambda: ...)
                ...
            """,
            """
            @overload
            def g(x: int): ...
            T: tuple[int, ...] = ...


            def f(x):
                new(x[...], ..., lambda: ...)
                try:
                    ...
                finally:
                    a(x)
            """,
        )

    @pytest.mark.parametrize(
        "signature",
        [
            "self, x",
            "self, z, *, y=2",
            "self, x, y=2",
            "self, x, *, y=3",
            "self, x, *, y",
            "self, x, *, y=2, **k",
        ],
    )
    def test_other_parameters_are_an_error(self, signature):
        fails(
            METHOD,
            f"class A:\n    def f({signature}):\n        new()\n        ...\n",
            "A.f",
            "signature",
        )

    @pytest.mark.parametrize("prefix", ["@classmethod\n    def", "async def"])
    def test_other_kind_of_method_is_an_error(self, prefix):
        fails(
            METHOD,
            f"class A:\n    {prefix} f(self, x, *, y=2):\n        ...\n        new()\n",
            "A.f",
            "signature",
        )

    def test_method_that_upstream_lacks_is_an_error(self):
        fails(
            METHOD,
            "class A:\n    def g(self):\n        new()\n        ...\n",
            "A.g",
            "no such definition",
        )

    names = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6, unique=True)

    @settings(max_examples=60, deadline=None)
    @given(names, st.data())
    def test_merging_twice_is_merging_once(self, upstream, data):
        """New statements around and between any upstream statements, `merged` checks twice."""
        cut = data.draw(st.sampled_from(upstream))
        new = data.draw(st.lists(st.sampled_from(["new()", "more()"]), max_size=2, unique=True))
        pattern = [*new[:1], "...", f"{cut}()  # anchor", *new[1:], "..."]
        before = "def f():\n" + "".join(f"    {name}()\n" for name in upstream)
        after = merged(before, "def f():\n" + "".join(f"    {line}\n" for line in pattern))
        expected = [*new[:1], *(f"{name}()" for name in upstream)]
        expected[expected.index(f"{cut}()") + 1 : expected.index(f"{cut}()") + 1] = new[1:]
        assert after == "def f():\n" + "".join(f"    {line}\n" for line in expected)


class TestReleases:
    OVERLAY = """
    # release: <0.23
    def f():
        return "old"


    # release: >=0.23,!=0.24.0
    # why
    def f():
        return "new"


    class A:
        # release: ==0.22.*
        def g(self):
            return 1
    """

    @pytest.mark.parametrize(
        "release, f, g",
        [
            ("0.22.1", "old", True),
            ("0.23.0", "new", False),
            ("0.24.0", "upstream", False),
            ("0.21.0", "old", False),
        ],
    )
    def test_definition_of_some_releases(self, release, f, g):
        before = 'def f():\n    return "upstream"\n\n\nclass A:\n    x = 1\n'
        after = merged(before, self.OVERLAY, release)
        assert f'return "{f}"' in after
        assert ("def g" in after) == g
        assert "release" not in after
        assert ("# why" in after) == (f == "new")

    def test_bad_specifier_is_an_error(self):
        fails("x = 1\n", "# release: new\nx = 2\n", "x", "`# release: new`")

    def test_whole_file_of_some_releases(self):
        """Said above the file's docstring; a comment above a definition is about that."""
        ours = b'# SPDX\n# release: >=0.30\n"""Compass."""\n\nx = 1\n'
        needed = {
            release: is_needed(ours, path=PATH, release=Version(release))
            for release in ("0.29.0", "0.30.0")
        }
        assert needed == {"0.29.0": False, "0.30.0": True}
        assert is_needed(b"# release: >=0.30\nx = 1\n", path=PATH, release=Version("0.29.0"))

    @pytest.mark.parametrize(
        "body",
        [
            "class A:\n    def f(self):\n        ...\n        a()\n",
            "class A:\n    def f(self):\n        a()  # anchor\n        b()\n",
            "def f(self):\n    try:\n        ...\n    finally:\n        a()\n",
            "...",
        ],
    )
    def test_difference_from_a_file_that_is_not_there_is_an_error(self, body):
        with pytest.raises(UserError, match="upstream has no such file"):
            added(body.encode(), path=PATH, release=Version("0.29.0"))

    def test_new_file_stays_as_it_is(self):
        ours = b"class A:\n    def f(self):\n        return 1\n"
        assert added(ours, path=BASE, release=Version("0.29.0")) == ours


class TestRemoval:
    def test_statement_that_is_named_to_go(self):
        check(
            """
            def f(x):
                a(x)
                b(x)
                c(x)
            """,
            """
            def f(x):
                ...
                # remove: c does it
                b(x)
                new(x)
                ...
            """,
            """
            def f(x):
                a(x)
                new(x)
                c(x)
            """,
        )

    def test_nothing_comes_for_it(self):
        check(
            """
            def f(x):
                a(x)
                if x:
                    b(x)
                return x
            """,
            """
            def f(x):
                ...
                # remove
                if x:
                    b(x)
                ...
            """,
            """
            def f(x):
                a(x)
                return x
            """,
        )

    def test_inside_blocks_whose_first_line_is_named(self):
        check(
            """
            def f(x):
                if x:
                    for y in x:
                        a(y)  # why
                        b(y)
                    c(x)
                else:
                    d(x)
                return x
            """,
            """
            def f(x):
                if x:
                    for y in x:
                        # remove
                        a(y)
                        new(y)
                        ...
                    ...
                ...
            """,
            """
            def f(x):
                if x:
                    for y in x:
                        new(y)
                        b(y)
                    c(x)
                else:
                    d(x)
                return x
            """,
        )

    def test_in_elif_and_else(self):
        check(
            """
            def f(x):
                if x:
                    a()
                elif y:
                    b()
                    c()
                else:
                    d()
                    e()
            """,
            """
            def f(x):
                if x:
                    ...
                elif y:
                    # remove
                    b()
                    ...
                else:
                    ...
                    new()
                ...
            """,
            """
            def f(x):
                if x:
                    a()
                elif y:
                    c()
                else:
                    d()
                    e()
                    new()
            """,
        )

    @pytest.mark.parametrize(
        "other", ["elif z:\n        ...\n        new()", "elif y:\n        new()"]
    )
    def test_what_goes_on_otherwise_is_an_error(self, other):
        fails(
            "def f(x):\n    if x:\n        a()\n    else:\n        b()\n",
            f"def f(x):\n    if x:\n        ...\n    {other}\n    ...\n",
            "goes on differently",
        )

    @pytest.mark.parametrize(
        "body, words",
        [
            ("...\n    # remove\n    gone()\n    new()\n    ...\n", "`gone()`"),
            ("...\n    if y:\n        ...\n        new()\n    ...\n", "`if y:"),
            (
                "...\n    if x:\n        # remove\n        gone()\n        new()\n        ...\n",
                "`gone()`",
            ),
        ],
    )
    def test_what_is_not_there_cannot_go(self, body, words):
        fails(
            "def f(x):\n    a(x)\n    if x:\n        b(x)\n", f"def f(x):\n    {body}", "f", words
        )

    def test_ambiguous_block_is_an_error(self):
        fails(
            "def f(x):\n    if x:\n        a()\n    if x:\n        b()\n",
            "def f(x):\n    if x:\n        new()\n        ...\n    ...\n",
            "2 times",
        )
