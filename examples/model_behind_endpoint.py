"""Evaluate a model that is behind an endpoint: only its scores are known, over HTTP."""

import robustkit
from robustkit.testing import ModelServer

if __name__ == "__main__":
    net = robustkit.load_model("robustkit:digits-cnn")
    data = robustkit.load_data("digits:test").head(20)
    with ModelServer(net).running() as server:
        model = robustkit.load_model(f"{server.url}?batch=20")
        report = robustkit.evaluate(model, data, threat="linf:0.15", suite="square(queries=100)")
        print(report.robust_accuracy, server.requests, "requests", server.images, "images")
