"""Python libraries and pytest tests as plain Starlark rules: no external repository, no C++ toolchain.

A library is a set of source and data files together with those of its dependencies. A test runs pytest on one file in a
folder that holds the files of its dependencies and nothing else, so an import that is not declared does not resolve.
Installed packages are not modelled: they are those of the tree's .venv, or else of the python3 that PATH finds.
"""

_ATTRIBUTES = {
    "srcs": attr.label_list(allow_files = [".py"]),
    "data": attr.label_list(allow_files = True),
    "deps": attr.label_list(),
}

def _runfiles(ctx):
    runfiles = ctx.runfiles(files = ctx.files.srcs + ctx.files.data)
    for dep in ctx.attr.deps:
        runfiles = runfiles.merge(dep[DefaultInfo].default_runfiles)
    return runfiles

def _library(ctx):
    return [DefaultInfo(files = depset(ctx.files.srcs), runfiles = _runfiles(ctx))]

# Runfiles are links into the source tree. They tell where .venv is; but a test that resolved them would see files which it
# never declared, so it gets copies.
_LAUNCHER = """#!/bin/sh
set -eu
source=$(readlink -f {test})
PATH="${{source%/{test}}}/.venv/bin:$PATH"
cp -RL . "$TEST_TMPDIR/declared"
cd "$TEST_TMPDIR/declared"
python3 -c 'import pytest_timeout, hypothesis' || {{ echo "error: $(command -v python3) lacks the test packages: run make venv"; exit 1; }}
exec python3 -m pytest -p no:cacheprovider --junitxml="$XML_OUTPUT_FILE" {test}
"""

def _test(ctx):
    launcher = ctx.actions.declare_file(ctx.label.name + ".sh")
    ctx.actions.write(launcher, _LAUNCHER.format(test = ctx.files.srcs[0].short_path), is_executable = True)
    return [DefaultInfo(executable = launcher, runfiles = _runfiles(ctx))]

nd_library = rule(implementation = _library, attrs = _ATTRIBUTES)
nd_test = rule(implementation = _test, attrs = _ATTRIBUTES, test = True)

def nd_tests(deps, common):
    """One test target per test file of this package.

    Args:
      deps: what each test imports, {"test_name": [library labels]}. A test file without an entry is an error.
      common: libraries that every test needs.
    """
    forgotten = [f for f in native.glob(["test_*.py"]) if f[:-len(".py")] not in deps]
    if forgotten:
        fail("no entry in nd_tests for: " + ", ".join(forgotten))
    for name in sorted(deps):
        nd_test(name = name, srcs = [name + ".py"], deps = common + deps[name])
