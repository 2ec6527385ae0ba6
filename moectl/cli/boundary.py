"""The one place where an exception becomes a sentence and an exit code.

Exceptions of libraries are known by their qualified name, so that nothing is imported to look at them.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from moectl.cli.output import out
from moectl.errors import ConfigError, MissingDependencyError, MoectlError, NotFoundError, did_you_mean

INTERRUPTED = 130
_EXTRAS = {
    "matplotlib": "report",
    "jinja2": "report",
    "lm_eval": "eval",
    "pynvml": "gpu",
    "trackio": "track",
    "mlflow": "track",
}


class Interrupted(BaseException):
    """Ctrl-C inside a command, with what to say of it. Typer makes a silent exit code of KeyboardInterrupt."""


def interruptible(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with its KeyboardInterrupt raised as :class:`Interrupted`."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except KeyboardInterrupt as error:
            raise Interrupted("interrupted") from error

    return run


def debugging() -> bool:
    """Whether tracebacks were asked for (``MOECTL_DEBUG``; ``--debug`` sets it)."""
    return os.environ.get("MOECTL_DEBUG", "").lower() not in ("", "0", "false", "no")


def guard(action: Callable[[], Any]) -> int:
    """Run ``action`` and return the exit code; whatever it raises is said on stderr.

    An int that ``action`` returns is the exit code.
    """
    try:
        result = action()
        sys.stdout.flush()
        return result if isinstance(result, int) and not isinstance(result, bool) else 0
    except (KeyboardInterrupt, Interrupted) as error:
        _trace()
        out().say(str(error) or "interrupted")
        return INTERRUPTED
    except SystemExit as stop:
        if _is_broken_pipe(stop.__context__):  # Typer turns EPIPE into SystemExit(1)
            return _reader_left()
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:
        return _reader_left()
    except Exception as error:
        _trace()
        explained = explain(error)
        out().error(explained)
        return explained.exit_code


def explain(error: BaseException) -> MoectlError:
    """The user's view of any exception: message, hint and exit code."""
    if isinstance(error, MoectlError):
        return error
    for kind in type(error).__mro__:
        handler = _TABLE.get(f"{kind.__module__}.{kind.__qualname__}")
        if handler is not None:
            return handler(error)
    detail = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {detail[0]}" if detail else type(error).__name__
    return MoectlError(f"internal error: {text}", "Run again with --debug (or MOECTL_DEBUG=1) for the traceback.")


def _usage(error: Any) -> MoectlError:
    """Typer's errors about options and arguments."""
    context = getattr(error, "ctx", None)
    path = str(getattr(context, "command_path", "moectl"))
    see = f"See `{path} --help`."
    option = getattr(error, "option_name", None)
    if option is not None and hasattr(error, "possibilities"):
        params = getattr(getattr(context, "command", None), "params", [])
        known = [name for param in params for name in (*param.opts, *param.secondary_opts) if name[:1] == "-"]
        suggestion = did_you_mean(str(option), [*known, "--help"])
        hint = f"{suggestion} {see}" if suggestion else see
        return ConfigError(f"unknown option '{option}' for `{path}`", hint)
    message = " ".join(str(error.format_message()).split()).rstrip(".").replace(": Input should", ": should")
    return ConfigError(message[:1].lower() + message[1:], see)


def _validation(error: Any) -> MoectlError:
    from moectl.config.loading import explain_validation

    return explain_validation(error)


def _yaml(error: Any) -> MoectlError:
    return ConfigError(f"not valid YAML: {' '.join(str(error).split())}", "Mend the file and run again.")


def _database(error: Any) -> MoectlError:
    detail = str(getattr(error, "orig", None) or error).splitlines()[0]
    if "locked" in detail:
        hint = "Another process holds the registry. Wait for it, or find it with `moectl runs ls`."
    elif "readonly" in detail or "unable to open" in detail:
        hint = "Set MOECTL_HOME to a folder that you can write to."
    else:
        hint = "The run folders are the truth: `moectl runs reindex` rebuilds the registry from them."
    return MoectlError(f"the run registry answered: {detail}", hint)


def _memory(error: BaseException) -> MoectlError:
    return MoectlError("out of memory", "Lower train.batch_size or data.block_size, or choose a smaller model.base.")


def _os_error(error: Any) -> MoectlError:
    where = f" {error.filename}" if error.filename else ""
    if error.errno == errno.ENOSPC or error.errno == errno.EDQUOT:
        return MoectlError(
            f"no space left on the disk while writing{where}",
            "Free some space (`moectl runs ls` shows old runs) and run again; finished files are whole.",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        reason = "the file system is read-only" if error.errno == errno.EROFS else "permission denied"
        return MoectlError(
            f"{reason}:{where or ' ' + str(error)}", "Set MOECTL_HOME to a folder that you can write to."
        )
    if error.errno == errno.ENOENT:
        return NotFoundError(f"no such file or folder:{where or ' ' + str(error)}", "Check the path.")
    return MoectlError(f"{error.strerror or error}{':' + where if where else ''}", "Check the path and the disk.")


def _missing_module(error: Any) -> MoectlError:
    package = str(error.name or "").split(".")[0]
    if package in ("", "moectl"):
        return MoectlError(f"internal error: {error}", "Reinstall moectl; `--debug` shows the traceback.")
    extra = _EXTRAS.get(package)
    command = f"pip install 'moectl[{extra}]'" if extra else f"pip install {package}"
    return MissingDependencyError(f"the package '{package}' is not installed", f"Install it: {command}")


_TABLE: dict[str, Callable[[Any], MoectlError]] = {
    "typer.exceptions.TyperException": _usage,
    "pydantic_core._pydantic_core.ValidationError": _validation,
    "yaml.error.YAMLError": _yaml,
    "sqlalchemy.exc.DatabaseError": _database,
    "sqlite3.DatabaseError": _database,
    "torch.OutOfMemoryError": _memory,
    "builtins.MemoryError": _memory,
    "builtins.ModuleNotFoundError": _missing_module,
    "builtins.OSError": _os_error,
}


def _trace() -> None:
    if debugging():
        traceback.print_exc(file=sys.stderr)


def _is_broken_pipe(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno == errno.EPIPE


def _reader_left() -> int:
    """``moectl … | head`` has what it wanted: end in silence, and keep the exit flush quiet."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
