"""The last forecast of each model, one row a model."""

from __future__ import annotations

from sqlalchemy import select

from calotype.serving.database.connection import reading, writing
from calotype.serving.database.repository import Repository, upsert
from calotype.serving.database.schema.tables import forecasts
from calotype.serving.jobs.forecast import Forecast


class Forecasts(Repository):
    """Written by dispatchers, read by gateways."""

    def save_forecast(self, forecast: Forecast) -> None:
        values = {
            "model": forecast.model,
            "updated": forecast.updated,
            "figures": forecast.to_payload(),
        }
        with writing(self.engine) as connection:
            upsert(connection, forecasts, values, ["model"])

    def get_forecast(self, model: str) -> Forecast:
        """The last one written; an empty one when the model was never served."""
        with reading(self.engine) as connection:
            query = select(forecasts.c.figures).where(forecasts.c.model == model)
            figures = connection.execute(query).scalar_one_or_none()
        return Forecast.from_payload(model, figures or {})
