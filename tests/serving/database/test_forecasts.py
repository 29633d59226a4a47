"""The last forecast of a model is read back, in both databases."""

from __future__ import annotations

from dataclasses import replace

from calotype.serving.database.connection import writing
from calotype.serving.database.database import Database
from calotype.serving.database.schema.tables import forecasts
from calotype.serving.jobs.forecast import Forecast
from calotype.serving.jobs.predictor import Work, WorkPredictor


def test_the_last_forecast_of_each_model_is_kept(database: Database) -> None:
    predictor = WorkPredictor()
    predictor.learn(Work("128x128", steps=20, n=1), 2.0)
    first = Forecast("a", 1.0, 2, 4.0, predictor=predictor.to_payload(), ends={"j": 2.0})
    last = replace(first, updated=2.0, queued=0, ends={}, positions={})
    for forecast in (first, replace(first, model="b"), last):
        database.forecasts.save_forecast(forecast)
    assert database.forecasts.get_forecast("a") == last and last.measured
    assert database.forecasts.get_forecast("b") == replace(first, model="b")


def test_a_forecast_of_another_release_is_read(database: Database) -> None:
    figures = {"queued": 3, "of_a_later_release": 1}
    with writing(database.engine) as connection:
        row = {"model": "a", "updated": 1.0, "figures": figures}
        connection.execute(forecasts.insert().values(row))
    assert database.forecasts.get_forecast("a") == Forecast("a", queued=3)
