"""What can go wrong in the kernel tools, each with the exit code that the command line ends with."""

from __future__ import annotations


class KernelToolError(Exception):
    """A tool cannot do what was asked. The message says what was found, what was needed and what to do next."""

    exit_code = 70


class CountingError(KernelToolError):
    """A compiled kernel's work cannot be counted exactly; a wrong count would be worse than none."""


class CompilationError(KernelToolError):
    """Triton refuses to compile a kernel."""


class NoSuchKernelError(KernelToolError):
    """No shipped kernel has that name, architecture or phase."""

    exit_code = 66


class ToolEnvironmentError(KernelToolError):
    """A package is missing or an environment variable is in the way."""

    exit_code = 78
