{{/* Names, labels, and what the other templates ask for. */}}

{{- define "perigee.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* Cut short, so that the names of pools fit behind it. */}}
{{- define "perigee.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "perigee.name" .) .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "perigee.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* What a release's pods are found by. */}}
{{- define "perigee.selector" -}}
app.kubernetes.io/name: {{ include "perigee.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "perigee.labels" -}}
{{ include "perigee.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* An image by its parts; `default` is the tag where none is given. */}}
{{- define "perigee.image" -}}
{{- $name := list .image.registry .image.repository | compact | join "/" -}}
{{- if .image.digest -}}
{{ $name }}@{{ .image.digest }}
{{- else -}}
{{ $name }}:{{ .image.tag | default .default }}
{{- end }}
{{- end }}

{{- define "perigee.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "perigee.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* What every container may do: nothing but run. */}}
{{- define "perigee.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Where the model lies in every container: what is set, or where `perigee model pull` puts what it is asked for. */}}
{{- define "perigee.modelPath" -}}
{{- $model := .Values.model }}
{{- $path := $model.path }}
{{- if and (not $path) $model.pull.enabled }}
{{- $reference := $model.pull.reference }}
{{- if hasPrefix "hf:" $reference }}
{{- $parts := splitList "/" (first (splitList "@" (trimPrefix "hf:" $reference))) }}
{{- $path = ternary (last $parts) (join "--" $parts) (gt (len $parts) 2) }}
{{- else }}
{{- $path = base (regexReplaceAll "[?#].*$" $reference "") }}
{{- end }}
{{- end }}
{{- if not $path }}
{{- fail "model.path must name the model's file or folder in the volume, since model.pull is disabled" }}
{{- end -}}
/models/{{ $path }}
{{- end }}

{{/* The value of registry.url. Members are named one by one, so that a client outlives each of them. */}}
{{- define "perigee.registry" -}}
{{- $endpoints := .Values.etcd.endpoints }}
{{- if .Values.etcd.enabled }}
{{- if $endpoints }}{{ fail "etcd.endpoints names another etcd, so etcd.enabled must be false" }}{{ end }}
{{- $etcd := printf "%s-etcd" (include "perigee.fullname" .) }}
{{- range $member := until (int .Values.etcd.replicas) }}
{{- $endpoints = append $endpoints (printf "%s-%d.%s-peers.%s.svc:2379" $etcd $member $etcd $.Release.Namespace) }}
{{- end }}
{{- else if not $endpoints }}
{{- fail "etcd.enabled is false, so etcd.endpoints must name another etcd: [HOST:PORT, …]" }}
{{- end -}}
etcd://{{ join "," $endpoints }}
{{- end }}

{{/* The secret with the pods' certificate. */}}
{{- define "perigee.tlsSecret" -}}
{{- $tls := .Values.tls }}
{{- if and $tls.existingSecret $tls.certManager.enabled }}
{{- fail "tls.existingSecret names a secret, so tls.certManager.enabled must be false" }}
{{- else if $tls.certManager.enabled -}}
{{ include "perigee.fullname" . }}-tls
{{- else -}}
{{ required "tls.enabled needs a certificate: name tls.existingSecret, or enable tls.certManager" $tls.existingSecret }}
{{- end }}
{{- end }}

{{/* The name that it bears. */}}
{{- define "perigee.tlsName" -}}
{{ .Values.tls.name | default (printf "%s.%s.svc" (include "perigee.fullname" .) .Release.Namespace) }}
{{- end }}

{{/* HTTP or HTTPS. */}}
{{- define "perigee.scheme" -}}
{{ ternary "https" "http" .Values.tls.enabled }}
{{- end }}

{{/* What a container mounts of secrets. Folders, since a file that is mounted alone never changes. */}}
{{- define "perigee.secretMounts" -}}
{{- $values := .root.Values }}
{{- if $values.tls.enabled }}
- {name: tls, mountPath: /etc/perigee-tls, readOnly: true}
{{- end }}
{{- if $values.etcd.tls.existingSecret }}
- {name: etcd-tls, mountPath: /etc/perigee-etcd, readOnly: true}
{{- end }}
{{- if and (eq .role "router") $values.apiKeys.existingSecret }}
- {name: api-keys, mountPath: /etc/perigee-keys, readOnly: true}
{{- end }}
{{- end }}

{{/* Their volumes, for the pod's group alone. */}}
{{- define "perigee.secretVolumes" -}}
{{- $values := .root.Values }}
{{- if $values.tls.enabled }}
- name: tls
  secret: {secretName: {{ include "perigee.tlsSecret" .root }}, defaultMode: 288}
{{- end }}
{{- with $values.etcd.tls.existingSecret }}
- name: etcd-tls
  secret: {secretName: {{ . }}, defaultMode: 288}
{{- end }}
{{- if and (eq .role "router") $values.apiKeys.existingSecret }}
- name: api-keys
  secret: {secretName: {{ $values.apiKeys.existingSecret }}, defaultMode: 288}
{{- end }}
{{- end }}

{{/* A key of TOML: bare where it may be. */}}
{{- define "perigee.tomlKey" -}}
{{- if regexMatch "^[A-Za-z0-9_-]+$" . }}{{ . }}{{ else }}{{ . | toJson }}{{ end }}
{{- end }}

{{/* A table as TOML: first what is no table, then those below it. Helm's own toToml makes 512.0 of 512. */}}
{{- define "perigee.toml" -}}
{{- $path := .path }}
{{- $tables := dict }}
{{- range $name, $value := .table }}
{{- $key := include "perigee.tomlKey" $name }}
{{- if kindIs "map" $value }}
{{- $_ := set $tables $key $value }}
{{- else if kindIs "string" $value }}
{{ $key }} = {{ $value | toJson }}
{{- else if and (kindIs "float64" $value) (eq $value (floor $value)) }}
{{ $key }} = {{ int64 $value }}
{{- else if not (kindIs "invalid" $value) }}
{{ $key }} = {{ $value }}
{{- end }}
{{- end }}
{{- range $key, $value := $tables }}
{{- $below := append $path $key }}

[{{ join "." $below }}]
{{- include "perigee.toml" (dict "path" $below "table" $value) }}
{{- end }}
{{- end }}

{{/*
All workloads of the binary, as a JSON list: role, pool, name, and `spec`: the values of all roles, of nodes, of the role and of the
pool, the later ones over the earlier ones.
*/}}
{{- define "perigee.pools" -}}
{{- $fullname := include "perigee.fullname" . }}
{{- $all := dict "config" .Values.config | merge (deepCopy .Values.defaults) }}
{{- $router := mergeOverwrite (deepCopy $all) (deepCopy .Values.router) (dict "kind" "Deployment") }}
{{- $pools := list (dict "role" "router" "pool" "default" "name" (printf "%s-router" $fullname) "spec" $router) }}
{{- range $role := list "prefill" "decode" "store" }}
{{- $values := index $.Values $role }}
{{- range $pool, $own := $values.pools }}
{{- $name := printf "%s-%s" $fullname $role }}
{{- if ne $pool "default" }}{{ $name = printf "%s-%s" $name $pool }}{{ end }}
{{- $spec := mergeOverwrite (deepCopy $all) (deepCopy $.Values.nodes) (deepCopy (omit $values "pools")) (deepCopy (default dict $own)) }}
{{- $pools = append $pools (dict "role" $role "pool" $pool "name" $name "spec" $spec) }}
{{- end }}
{{- end }}
{{- $pools | toJson }}
{{- end }}

{{/* What a pool's pods are found by. */}}
{{- define "perigee.poolSelector" -}}
{{ include "perigee.selector" .root }}
app.kubernetes.io/component: {{ .role }}
perigee/pool: {{ .pool }}
{{- end }}

{{/* Without the chart's version, which would start every pod anew. */}}
{{- define "perigee.podLabels" -}}
{{ include "perigee.poolSelector" . }}
{{- if ne .role "router" }}
perigee/node: "true"
{{- end }}
{{- end }}

{{- define "perigee.poolLabels" -}}
{{ include "perigee.labels" .root }}
app.kubernetes.io/component: {{ .role }}
perigee/pool: {{ .pool }}
{{- end }}

{{/* How long a router that ends is still found by those who have not heard of it. */}}
{{- define "perigee.leaveSeconds" -}}
5
{{- end }}

{{/* How long a node may take to finish its requests before it is told to end: the grace period without what it needs after that. */}}
{{- define "perigee.drainSeconds" -}}
{{- max 1 (sub .terminationGracePeriodSeconds 30) -}}
{{- end }}

{{/* perigee.toml of a pool: its settings, and over them what the chart itself decides. */}}
{{- define "perigee.config" -}}
{{- $values := .root.Values }}
{{- $own := dict
  "node" (dict
    "listen" (ternary "::" "0.0.0.0" (eq $values.ipFamily "IPv6"))
    "http_port" $values.ports.http
    "grpc_port" $values.ports.grpc
    "transfer_port" $values.ports.transfer)
  "registry" (dict "url" (include "perigee.registry" .root))
  "model" (dict "path" (include "perigee.modelPath" .root)) }}
{{- if $values.model.name }}
{{- $_ := set $own.model "name" $values.model.name }}
{{- end }}
{{- if $values.tls.enabled }}
{{- $_ := set $own "tls" (dict
  "certificate" "/etc/perigee-tls/tls.crt"
  "key" "/etc/perigee-tls/tls.key"
  "authority" "/etc/perigee-tls/ca.crt"
  "name" (include "perigee.tlsName" .root)) }}
{{- end }}
{{- if $values.etcd.tls.existingSecret }}
{{- if $values.etcd.enabled }}{{ fail "etcd.tls is for another etcd, so etcd.enabled must be false" }}{{ end }}
{{- $_ := set $own.registry "etcd_authority" "/etc/perigee-etcd/ca.crt" }}
{{- if $values.etcd.tls.clientCertificate }}
{{- $_ := set $own.registry "etcd_certificate" "/etc/perigee-etcd/tls.crt" }}
{{- $_ := set $own.registry "etcd_key" "/etc/perigee-etcd/tls.key" }}
{{- end }}
{{- end }}
{{- if and (eq .role "router") $values.apiKeys.existingSecret }}
{{- $_ := set $own "router" (dict "api_keys_file" (printf "/etc/perigee-keys/%s" $values.apiKeys.key)) }}
{{- end }}
{{- $config := deepCopy .spec.config }}
{{- if eq .role "router" }}
{{- $rest := sub .spec.terminationGracePeriodSeconds (add (include "perigee.leaveSeconds" .root) 5) }}
{{- $config = mergeOverwrite (dict "node" (dict "drain_deadline" (printf "%ds" (max 1 $rest)))) $config }}
{{- else }}
{{- if .spec.disk.enabled }}
{{- $_ := set $own "kv" (dict "disk_path" "/var/lib/perigee" "disk_capacity" .spec.disk.capacity) }}
{{- end }}
{{- if and .spec.rdma.enabled .spec.rdma.hugepages.amount }}
{{- $config = mergeOverwrite (dict "kv" (dict "huge_pages" "reserved")) $config }}
{{- end }}
{{- end }}
{{- include "perigee.toml" (dict "path" list "table" (mergeOverwrite $config $own)) | trim }}
{{- end }}

{{/* The label matchers of this release, for PromQL. */}}
{{- define "perigee.matchers" -}}
namespace="{{ .Release.Namespace }}",release="{{ .Release.Name }}"
{{- end }}

{{/* Pods of this release, by component: who may be talked to. */}}
{{- define "perigee.peers" -}}
{{- range .components }}
- podSelector:
    matchLabels:
      {{- include "perigee.selector" $.root | nindent 6 }}
      app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end }}

{{/* One node less at a time, and late: what it had cached moves to its peers first. */}}
{{- define "perigee.scaleDown" -}}
scaleDown:
  stabilizationWindowSeconds: {{ .scaleDownStabilizationSeconds }}
  policies:
    - {type: Pods, value: 1, periodSeconds: 120}
{{- end }}

{{/* PromQL: the part of a pool of KV blocks that is in use, by pod. The argument is matchers. */}}
{{- define "perigee.kvUsed" -}}
sum by (namespace, pod) (perigee_kvstore_blocks{ {{- . }},state=~"owned|pinned"}) / sum by (namespace, pod) (perigee_kvstore_blocks{ {{- . -}} })
{{- end }}

{{/* A bound of a histogram as its label says it, whole numbers with and without a fraction. */}}
{{- define "perigee.le" -}}
{{- if eq (float64 .) (floor .) }}le=~"{{ int . }}([.]0)?"{{ else }}le="{{ . }}"{{ end }}
{{- end }}

{{/*
PromQL: how many times as many gaps between tokens as the SLO allows were too long, at most 2, so that nothing scales by more than twice
at a time. Arguments: root, matchers, by: labels, or "" for all together.
*/}}
{{- define "perigee.gapPressure" -}}
{{- $slo := .root.Values.slo }}
{{- $by := ternary "" (printf " by (%s)" .by) (empty .by) }}
{{- $gaps := "perigee_decode_inter_token_latency_seconds" -}}
clamp_max((1 - sum{{ $by }} (rate({{ $gaps }}_bucket{ {{- .matchers }},{{ include "perigee.le" $slo.interTokenLatencySeconds }}}[5m])) / (sum{{ $by }} (rate({{ $gaps }}_count{ {{- .matchers -}} }[5m])) > 0)) / {{ include "perigee.misses" $slo }}, 2)
{{- end }}

{{/* The part that may miss its limit. */}}
{{- define "perigee.misses" -}}
{{ printf "%g" (divf (subf 100 .attainmentPercent) 100) }}
{{- end }}
