-- The tables of DESIGN section 8.

CREATE SCHEMA IF NOT EXISTS mollifier;

-- A key may hold any text up to 2,048 characters, which no btree entry can: the unique index is over
-- its digest. The parts are joined by a NUL, which no text in Postgres can contain in itself.
-- IMMUTABLE although convert_to is only STABLE: the encoding of a database never changes.
CREATE FUNCTION mollifier.key_digest(organization_id text, environment_id text, task text, key text)
RETURNS bytea
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT sha256(
        convert_to(organization_id, 'UTF8') || '\x00'::bytea
        || convert_to(environment_id, 'UTF8') || '\x00'::bytea
        || convert_to(task, 'UTF8') || '\x00'::bytea
        || convert_to(key, 'UTF8')
    )
$$;

CREATE TABLE mollifier.runs (
    id text COLLATE "C" PRIMARY KEY,
    friendly_id text COLLATE "C" GENERATED ALWAYS AS ('run_' || id) STORED,
    organization_id text NOT NULL,
    project_id text NOT NULL,
    environment_id text NOT NULL,
    environment_type text NOT NULL,
    task text NOT NULL,
    status text NOT NULL CHECK (status IN (
        'DELAYED', 'QUEUED', 'EXECUTING', 'COMPLETED', 'FAILED', 'CANCELED', 'EXPIRED', 'SYSTEM_FAILURE'
    )),
    payload bytea,
    payload_type text NOT NULL,
    metadata jsonb,
    metadata_version integer NOT NULL DEFAULT 1,
    tags text[] NOT NULL DEFAULT '{}',
    idempotency_key text,
    idempotency_key_expires_at timestamptz,
    idempotency_key_options jsonb,
    delay_until timestamptz,
    ttl_seconds integer,
    expires_at timestamptz,
    queue text,
    concurrency_key text,
    worker_queue text,
    machine text,
    priority integer NOT NULL DEFAULT 0,
    max_attempts integer,
    max_duration integer,
    locked_to_version text,
    is_test boolean NOT NULL DEFAULT false,
    depth integer NOT NULL DEFAULT 0,
    parent_run_id text COLLATE "C",
    root_run_id text COLLATE "C",
    resume_parent_on_completion boolean NOT NULL DEFAULT false,
    batch_id text,
    batch_index integer,
    debounce_key text,
    debounce_until timestamptz,
    one_time_use_token text,
    replayed_from_run_id text COLLATE "C",
    trace_id text NOT NULL,
    span_id text NOT NULL,
    parent_span_id text,
    trace_context jsonb,
    cancelled_at timestamptz,
    cancel_reason text,
    error jsonb,
    created_at timestamptz NOT NULL,
    buffered_at timestamptz,
    materialised_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);

COMMENT ON COLUMN mollifier.runs.created_at IS 'when the request was made';
COMMENT ON COLUMN mollifier.runs.buffered_at IS 'when the buffer accepted it; null when it passed through';
COMMENT ON COLUMN mollifier.runs.materialised_at IS 'when this row was written';

CREATE UNIQUE INDEX runs_idempotency_key ON mollifier.runs
    (mollifier.key_digest(organization_id, environment_id, task, idempotency_key)) WHERE idempotency_key IS NOT NULL;
CREATE UNIQUE INDEX runs_one_time_use_token ON mollifier.runs (one_time_use_token)
    WHERE one_time_use_token IS NOT NULL;
CREATE UNIQUE INDEX runs_debounce_key ON mollifier.runs
    (mollifier.key_digest(organization_id, environment_id, task, debounce_key))
    WHERE debounce_key IS NOT NULL AND status = 'DELAYED';

-- What an insert is given: one array of these is one argument, whatever the size of a batch.
CREATE TYPE mollifier.new_run AS (
    id text,
    organization_id text,
    project_id text,
    environment_id text,
    environment_type text,
    task text,
    payload bytea,
    payload_type text,
    tags text[],
    idempotency_key text,
    idempotency_key_expires_at timestamptz,
    delay_until timestamptz,
    ttl_seconds integer,
    expires_at timestamptz,
    queue text,
    concurrency_key text,
    worker_queue text,
    machine text,
    priority integer,
    max_attempts integer,
    max_duration integer,
    locked_to_version text,
    is_test boolean,
    depth integer,
    parent_run_id text,
    root_run_id text,
    resume_parent_on_completion boolean,
    batch_id text,
    batch_index integer,
    debounce_key text,
    debounce_until timestamptz,
    one_time_use_token text,
    replayed_from_run_id text,
    trace_id text,
    span_id text,
    parent_span_id text,
    created_at timestamptz,
    buffered_at timestamptz,
    status text,
    metadata jsonb,
    idempotency_key_options jsonb,
    trace_context jsonb,
    cancelled_at timestamptz,
    cancel_reason text,
    error jsonb
);

-- An id that was accepted but lost its key to another run: it resolves to the winner for ever.
CREATE TABLE mollifier.run_aliases (
    id text COLLATE "C" PRIMARY KEY,
    run_id text COLLATE "C" NOT NULL,
    environment_id text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

-- A parent that waits for its child.
CREATE TABLE mollifier.waitpoints (
    child_run_id text COLLATE "C" NOT NULL,
    parent_run_id text COLLATE "C" NOT NULL,
    environment_id text NOT NULL,
    status text NOT NULL DEFAULT 'PENDING' CHECK (status IN ('PENDING', 'COMPLETED')),
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (child_run_id, parent_run_id)
);

-- What operators have decided for one organization; a missing row or a null leaves it to the default.
CREATE TABLE mollifier.organization_settings (
    organization_id text PRIMARY KEY,
    enrolled boolean,
    weight integer NOT NULL DEFAULT 1 CHECK (weight > 0),
    updated_at timestamptz NOT NULL DEFAULT now()
);

-- What operators have decided for the whole fleet, by name.
CREATE TABLE mollifier.settings (
    name text PRIMARY KEY,
    value jsonb NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now()
);
