"""A helper process in which a grammar is tried before the server's own process compiles it.

It is run as a script and knows nothing of the package: what a hostile grammar can break is this process
alone. One line of JSON comes in for each grammar, one goes out: the error, or nothing.
"""

import json
import resource
import sys
import threading

SECONDS, BYTES, STACK = 2, 2 * 2**30, 256 * 2**20


class Bytes:
    """As little of a tokenizer as will do: one token for each byte, and the end."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"")
    special_token_ids = (256,)
    is_tokenizer_wrapper = True

    def __call__(self, text: "bytes | str") -> "list[int]":
        return list(text if isinstance(text, bytes) else text.encode())


def main() -> None:
    from llguidance import LLMatcher, LLTokenizer

    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    tokens = LLTokenizer(Bytes(), slices=[])  # type: ignore[arg-type]
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        spent = int(used.ru_utime + used.ru_stime)
        resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS, spent + SECONDS))
        matcher = LLMatcher(tokens, json.loads(line), log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()
        print(json.dumps(matcher.get_error()), flush=True)


if __name__ == "__main__":
    threading.stack_size(STACK)
    worker = threading.Thread(target=main)
    worker.start()
    worker.join()
