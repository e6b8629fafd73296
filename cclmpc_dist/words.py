"""Words that follow a number."""


def counted(number: int, noun: str) -> str:
    """`1 shard`, `2 shards`, `2 classes`: of nouns that take -s, or -es after s and ch."""
    ending = "" if number == 1 else "es" if noun.endswith(("s", "ch")) else "s"
    return f"{number} {noun}{ending}"
