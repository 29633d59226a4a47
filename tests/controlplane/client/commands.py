"""What kubectl and helm wrote, and how they ended."""

import subprocess


class Answer(str):
    """What a command wrote to stdout, with `err` (stderr), `code` (exit code) and `command`."""

    err: str
    code: int
    command: list[str]

    def __new__(cls, done: subprocess.CompletedProcess[str]) -> "Answer":
        answer = super().__new__(cls, done.stdout)
        answer.err, answer.code, answer.command = done.stderr, done.returncode, list(done.args)
        return answer

    @property
    def out(self) -> str:
        return str(self)


class CommandFailed(AssertionError):
    """kubectl or helm ended with an error: `answer` has what it wrote, `pods` what its pods say."""

    def __init__(self, answer: Answer, pods: str = "") -> None:
        words = " ".join(answer.command)
        super().__init__(f"{words}\nended with {answer.code}\n{answer.err}{answer.out}{pods}")
        self.answer = answer
