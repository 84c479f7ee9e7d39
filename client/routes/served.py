"""What is served, for the routes of every protocol."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from client.deployment import Deployment


async def _deployment(request: Request) -> Deployment:
    deployment: Deployment = request.app.state.deployment
    return deployment


Served = Annotated[Deployment, Depends(_deployment)]
