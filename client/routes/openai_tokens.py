"""``POST /tokenize`` and ``POST /detokenize``, as vLLM has them."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from client.routes.errors import documented
from client.routes.json_body import require_json
from client.routes.problem import OPENAI
from client.routes.served import Served
from client.schemas.openai_tokens import DetokenizeAnswer, DetokenizeRequest, TokenizeAnswer, TokenizeRequest
from server.errors import InvalidRequest

ERRORS = documented(400, 404, 413, 415, 422, 429, 431, 500, 503, dialect=OPENAI)

router = APIRouter(tags=["OpenAI"], dependencies=[Depends(require_json)])


@router.post("/tokenize", responses=ERRORS)
async def tokenize(deployment: Served, body: TokenizeRequest) -> TokenizeAnswer:
    """The tokens of a prompt, or of a conversation in the model's chat template."""
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("must be given, or messages, and not both", "prompt")
    name = body.model or deployment.first_name
    model = deployment.model(name)
    if body.prompt is not None:
        tokens = await model.server.tokenize(body.prompt, body.add_special_tokens)
    else:
        messages = [message.for_template() for message in body.messages or ()]
        tokens = await model.server.tokenize(model.chat_prompt(name, messages), add_special_tokens=False)
    return TokenizeAnswer(count=len(tokens), max_model_len=model.server.max_model_len, tokens=tokens)


@router.post("/detokenize", responses=ERRORS)
async def detokenize(deployment: Served, body: DetokenizeRequest) -> DetokenizeAnswer:
    """The text of tokens."""
    server = deployment.model(body.model or deployment.first_name).server
    server.check_token_ids(body.tokens, "tokens")
    return DetokenizeAnswer(prompt=server.tokenizer.decode(body.tokens, show_special=True))
