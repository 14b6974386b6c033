//! What every process needs: configuration, registry, telemetry, health, shutdown.
