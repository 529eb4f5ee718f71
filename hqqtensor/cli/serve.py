"""``hqqtensor serve``: the server of ``transformers serve`` with one model, opened as hqqtensor opens it."""

import argparse
import socket
import sys
from typing import Any

from hqqtensor.cli import model_dir, running
from hqqtensor.cli.errors import CommandError, UsageError
from hqqtensor.cli.output import print_json
from hqqtensor.cli.serve_limits import Limits

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health")
"""What of the server's paths a text model answers."""


def run(args: argparse.Namespace) -> int:
    """Open the model, listen, and serve until the process is interrupted."""
    check_installed()
    name = args.name or args.dir.resolve().name
    if any(sign in name for sign in "@:"):  # the server reads a revision or a file after these
        raise UsageError(f"the model's name in requests must have no '@' and no ':', got {name!r}; give another --name")
    listening = listen(args.host, args.port)
    with listening:
        model_dir.quantization_of(args.dir)  # an error before all else
        tokenizer = model_dir.open_tokenizer(args.dir)
        model = running.open_to_write(args.dir, args.bits, args.json, args.mmap)
        host, port = args.host, listening.getsockname()[1]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        if args.json:
            print_json({"url": url, "model": name, "paths": list(PATHS)})
            sys.stdout.flush()
        else:
            print(f"serving {name} at {url}/v1 (Ctrl-C ends)", file=sys.stderr)
        make_server(make_app(model, tokenizer, name, args.max_requests)).run(sockets=[listening])
    return 0


def check_installed() -> None:
    """CommandError with the command that installs what the server needs."""
    model_dir.import_transformers()
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise CommandError("this command needs fastapi, uvicorn and openai (pip install 'hqqtensor[serve]')")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, so that a port in use is known before the model is read; UsageError where it is."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()  # who asks before the model is ready waits for it
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot listen on {host}:{port}: {error}") from error
    return listening


def make_app(model: Any, tokenizer: Any, name: str, most_requests: int = 256) -> Any:
    """The application of ``transformers serve`` that answers with this model alone, and at most so many requests at
    once (more get status 503).

    Requests are answered together where ``GenerateTogether`` serves the model. Where it does not, one line on stderr
    says why, and they take turns.
    """
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState

    from hqqtensor.cli import serve_together  # needs what `check_installed` looks for

    class OneModel(ModelManager):
        """Transformers' manager, which holds one model for ever and loads no other."""

        def _load_model(self, *_args: Any, **_options: Any) -> Any:
            return model

        def _load_processor(self, *_args: Any, **_options: Any) -> Any:
            return tokenizer

        def get_gen_models(self, _cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
            return [{"id": name, "object": "model", "owned_by": "hqqtensor", "created": 0}]

    manager = OneModel(device="cpu", force_model=name)
    try:
        state = serve_together.answer_together(model, most_requests)
    except ValueError as error:
        print(f"requests take turns: {error}", file=sys.stderr)
        state = GenerationState()
    handlers = {
        "completion_handler": CompletionHandler, "response_handler": ResponseHandler,
        "transcription_handler": TranscriptionHandler, "systemone_handler": SystemOneHandler,
    }  # fmt: skip
    app = build_server(
        manager,
        ChatCompletionHandler(model_manager=manager, generation_state=state),
        generation_state=state,
        **{option: handler(model_manager=manager, generation_state=state) for option, handler in handlers.items()},
    )
    app.add_middleware(Limits, most=most_requests)
    return app


def make_server(app: Any) -> Any:
    """The uvicorn server of an application; ``run(sockets=[...])`` answers until it is interrupted."""
    import uvicorn

    return uvicorn.Server(uvicorn.Config(app, log_level="warning"))
