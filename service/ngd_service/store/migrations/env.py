"""Alembic's entry: runs on the connection that service/ngd_service/store/schema.py hands over."""

from alembic import context

from ngd_service.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
