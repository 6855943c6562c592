"""
llama.cpp's server as a program, out of the package xllamacpp; takes the flags of llama-server that we use.
"""

from __future__ import annotations

import argparse
import signal
import sys

import xllamacpp


def main() -> None:
    """Serve until a signal ends the process."""
    options = _parser().parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.model_alias = {options.alias}
    params.hostnames = [options.host]
    params.n_ctx = options.ctx_size
    params.n_parallel = options.parallel
    params.n_gpu_layers = options.n_gpu_layers
    params.cache_type_k, params.cache_type_v = options.cache_type_k, options.cache_type_v
    params.fit_params = options.fit == "on"
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.n_threads_http = options.threads_http
    params.cache_ram_mib = options.cache_ram
    params.verbosity = options.log_verbosity
    params.ui = not options.no_webui
    params.use_jinja = options.jinja
    params.embedding = options.embeddings
    try:
        server = xllamacpp.Server(params)  # serves from threads of its own, as long as it is referred to
    except RuntimeError:
        sys.exit(1)  # llama.cpp has printed the reason; the exception says only that there was one
    print(f"serving on {server.listening_address}", flush=True)  # noqa: T201 - into the engine's log
    signal.pause()  # the signals that end us are not caught


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--alias", required=True)
    parser.add_argument("--host", required=True, help="path of a Unix socket, ending in .sock")
    parser.add_argument("--ctx-size", type=int, required=True)
    parser.add_argument("--parallel", type=int, required=True)
    parser.add_argument("--n-gpu-layers", type=int, default=0)
    for cache in ("--cache-type-k", "--cache-type-v"):
        parser.add_argument(cache, type=_ggml_type, default=xllamacpp.ggml_type.GGML_TYPE_F16)
    parser.add_argument("--fit", choices=("on", "off"), default="on")
    parser.add_argument("--threads", type=int, default=-1, help="-1 = as many as there are cores")
    parser.add_argument("--threads-http", type=int, default=-1)
    parser.add_argument("--cache-ram", type=int, default=8192, help="MiB")
    parser.add_argument("--log-verbosity", type=int, default=3)
    parser.add_argument("--no-webui", action="store_true")
    parser.add_argument("--jinja", action="store_true")
    parser.add_argument("--embeddings", action="store_true")
    return parser


def _ggml_type(name: str) -> xllamacpp.ggml_type:
    try:
        return xllamacpp.ggml_type[f"GGML_TYPE_{name.upper()}"]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{name} is no type of ggml") from None


if __name__ == "__main__":
    main()
