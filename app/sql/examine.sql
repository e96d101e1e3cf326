-- What Postgres says about itself and about the user who asks.
-- Returns one row; a limit of connections that is not set is null.
SELECT
    current_setting('server_version') AS version,
    current_setting('server_version_num')::integer AS version_number,
    pg_is_in_recovery() AS is_standby,
    current_setting('transaction_read_only') = 'on' AS is_read_only,
    current_setting('fsync') = 'on' AS syncs,
    current_setting('full_page_writes') = 'on' AS writes_full_pages,
    current_setting('synchronous_commit') AS synchronous_commit,
    current_setting('max_connections')::integer AS max_connections,
    current_setting('superuser_reserved_connections')::integer
        + coalesce(current_setting('reserved_connections', true), '0')::integer AS reserved,
    (SELECT nullif(rolconnlimit, -1) FROM pg_roles WHERE rolname = current_user) AS limit_of_user,
    (SELECT nullif(datconnlimit, -1) FROM pg_database WHERE datname = current_database()) AS limit_of_database,
    (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend') AS in_use
