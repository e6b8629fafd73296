"""Methods by the name that `method:` takes."""

from cclmpc_dist.config import Config
from cclmpc_dist.methods.ccl_mpc import CCLMPC
from cclmpc_dist.methods.method import Corpus, Method
from cclmpc_dist.methods.supervised import Supervised

METHODS: dict[str, type[Method]] = {"ccl_mpc": CCLMPC, "supervised": Supervised}


def create(config: Config, corpus: Corpus) -> Method:
    return METHODS[config.method](config, corpus)
