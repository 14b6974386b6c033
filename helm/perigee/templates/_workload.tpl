{{/* The one pod of all roles and pools, and the workload around it. Arguments: root, role, pool, name, spec. */}}

{{- define "perigee.workload" -}}
{{- $root := .root }}
{{- $spec := .spec }}
{{- $stateful := eq $spec.kind "StatefulSet" }}
{{- $disk := and (ne .role "router") $spec.disk.enabled }}
apiVersion: apps/v1
kind: {{ $spec.kind }}
metadata:
  name: {{ .name }}
  labels:
    {{- include "perigee.poolLabels" . | nindent 4 }}
spec:
  {{- if eq (dig "autoscaling" "kind" "none" $spec) "none" }}
  replicas: {{ $spec.replicas }}
  {{- end }}
  selector:
    matchLabels:
      {{- include "perigee.poolSelector" . | nindent 6 }}
  {{- if $stateful }}
  serviceName: {{ include "perigee.fullname" $root }}-nodes
  # Nodes need no order among each other, and all of them at once load the model as fast as one.
  podManagementPolicy: Parallel
  updateStrategy:
    type: RollingUpdate
  {{- else }}
  strategy:
    type: RollingUpdate
    {{- /* For one node more there may be no machine. */}}
    rollingUpdate: {{ ternary "{maxUnavailable: 0, maxSurge: 1}" "{maxUnavailable: 1, maxSurge: 0}" (eq .role "router") }}
  {{- end }}
  template:
    metadata:
      labels:
        {{- include "perigee.podLabels" . | nindent 8 }}
        {{- with $spec.podLabels }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      annotations:
        checksum/config: {{ include "perigee.config" . | sha256sum }}
        {{- with $spec.podAnnotations }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    spec:
      {{- include "perigee.podSpec" . | trim | nindent 6 }}
  {{- if and $disk $stateful }}
  volumeClaimTemplates:
    - apiVersion: v1
      kind: PersistentVolumeClaim
      metadata:
        name: disk
      spec:
        {{- include "perigee.diskClaim" $spec.disk | nindent 8 }}
  {{- end }}
{{- end }}

{{- define "perigee.podSpec" -}}
{{- $root := .root }}
{{- $spec := .spec }}
{{- $values := $root.Values }}
{{- $rdma := and (ne .role "router") $spec.rdma.enabled }}
{{- $disk := and (ne .role "router") $spec.disk.enabled }}
{{- $image := include "perigee.image" (dict "image" $values.image "default" $root.Chart.AppVersion) }}
serviceAccountName: {{ include "perigee.serviceAccountName" $root }}
automountServiceAccountToken: false
# Variables of services begin with the release's name, and the binary reads those that begin with PERIGEE_.
enableServiceLinks: false
{{- with $values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if and $rdma $spec.rdma.hostNetwork }}
hostNetwork: true
dnsPolicy: ClusterFirstWithHostNet
{{- end }}
terminationGracePeriodSeconds: {{ $spec.terminationGracePeriodSeconds }}
securityContext:
  {{- $security := $spec.podSecurityContext }}
  {{- if and $rdma $spec.rdma.runAsRoot }}
  {{- $security = mergeOverwrite (deepCopy $security) (dict "runAsNonRoot" false "runAsUser" 0 "runAsGroup" 0) }}
  {{- end }}
  {{- toYaml $security | nindent 2 }}
{{- with $spec.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $spec.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- include "perigee.scheduling" (dict "spec" $spec "selector" (include "perigee.poolSelector" .)) }}
{{- if $values.model.pull.enabled }}
initContainers:
  {{- include "perigee.pullContainer" (dict "root" $root "image" $image) | trim | nindent 2 }}
{{- end }}
containers:
  - name: perigee
    image: {{ $image }}
    imagePullPolicy: {{ $values.image.pullPolicy }}
    args:
      - {{ .role }}
      {{- with $spec.extraArgs }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    env:
      - name: POD_IP
        valueFrom:
          fieldRef: {fieldPath: status.podIP}
      - name: PERIGEE_CONFIG
        value: /etc/perigee/perigee.toml
      - name: PERIGEE_NODE__ID
        valueFrom:
          fieldRef: {fieldPath: metadata.name}
      - name: PERIGEE_NODE__ADVERTISE
        value: {{ ternary "[$(POD_IP)]" "$(POD_IP)" (eq $values.ipFamily "IPv6") | quote }}
      {{- if eq .role "router" }}
      # For `kubectl exec … perigee status`.
      - name: PERIGEE_ROUTER
        value: localhost:{{ $values.ports.grpc }}
      {{- end }}
      {{- with $spec.extraEnv }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    {{- with $spec.extraEnvFrom }}
    envFrom:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    ports:
      - {name: http, containerPort: {{ $values.ports.http }}}
      - {name: grpc, containerPort: {{ $values.ports.grpc }}}
      {{- if ne .role "router" }}
      - {name: transfer, containerPort: {{ $values.ports.transfer }}}
      {{- end }}
    {{- range $probe, $path := dict "startup" "/livez" "liveness" "/livez" "readiness" "/readyz" }}
    {{ $probe }}Probe:
      httpGet: {path: {{ $path }}, port: http{{ if $values.tls.enabled }}, scheme: HTTPS{{ end }}}
      {{- toYaml (index $spec.probes $probe) | nindent 6 }}
    {{- end }}
    {{- if $spec.drain.enabled }}
    lifecycle:
      preStop:
        {{- if eq .role "router" }}
        # Until nobody sends it anything new. What runs has until node.drain_deadline.
        sleep: {seconds: {{ include "perigee.leaveSeconds" $root }}}
        {{- else }}
        # The rest of the grace period is for node.drain_timeout, and for giving its blocks to its peers.
        exec:
          command: [perigee, node, drain, --self, --wait, --timeout, {{ include "perigee.drainSeconds" $spec }}s]
        {{- end }}
    {{- end }}
    securityContext:
      {{- include "perigee.containerSecurityContext" $root | nindent 6 }}
      {{- if $rdma }}
        add: [IPC_LOCK]
      {{- end }}
    resources:
      {{- include "perigee.resources" . | nindent 6 }}
    volumeMounts:
      - {name: config, mountPath: /etc/perigee, readOnly: true}
      - {name: model, mountPath: /models, readOnly: true}
      {{- with include "perigee.secretMounts" . | trim }}
      {{- . | nindent 6 }}
      {{- end }}
      {{- if $disk }}
      - {name: disk, mountPath: /var/lib/perigee}
      {{- end }}
      {{- with $spec.extraVolumeMounts }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
volumes:
  - name: config
    configMap: {name: {{ .name }}}
  - name: model
    {{- include "perigee.modelVolume" $root | trim | nindent 4 }}
  {{- with include "perigee.secretVolumes" . | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- if and $disk (ne $spec.kind "StatefulSet") }}
  - name: disk
    ephemeral:
      volumeClaimTemplate:
        spec:
          {{- include "perigee.diskClaim" $spec.disk | nindent 10 }}
  {{- end }}
  {{- with $spec.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{/* Where a pod may run. Constraints that select nothing get `selector`. */}}
{{- define "perigee.scheduling" -}}
{{- $selector := .selector }}
{{- with .spec.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .spec.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .spec.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .spec.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- range . }}
  - {{ toYaml . | nindent 4 | trim }}
    {{- if not .labelSelector }}
    labelSelector:
      matchLabels:
        {{- $selector | nindent 8 }}
    {{- end }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Resources with what RDMA needs. */}}
{{- define "perigee.resources" -}}
{{- $resources := deepCopy .spec.resources }}
{{- if and (ne .role "router") .spec.rdma.enabled }}
{{- $rdma := .spec.rdma }}
{{- $limits := dict $rdma.resourceName (toString $rdma.count) }}
{{- if $rdma.hugepages.amount }}
{{- $_ := set $limits (printf "hugepages-%s" $rdma.hugepages.size) $rdma.hugepages.amount }}
{{- end }}
{{- $resources = mergeOverwrite $resources (dict "limits" $limits) }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{- define "perigee.pullContainer" -}}
{{- $root := .root }}
{{- $pull := $root.Values.model.pull }}
- name: model
  image: {{ .image }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  args:
    - model
    - pull
    - {{ required "model.pull.reference must say what to get" $pull.reference | quote }}
    - --to=/models
    {{- with $pull.sha256 }}
    - --sha256={{ . }}
    {{- end }}
  {{- if or $pull.hfToken.existingSecret $pull.extraEnv }}
  env:
    {{- with $pull.hfToken }}
    {{- if .existingSecret }}
    - name: HF_TOKEN
      valueFrom:
        secretKeyRef: {name: {{ .existingSecret }}, key: {{ .key }}}
    {{- end }}
    {{- end }}
    {{- with $pull.extraEnv }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
  securityContext:
    {{- include "perigee.containerSecurityContext" $root | nindent 4 }}
  resources:
    {{- toYaml $pull.resources | nindent 4 }}
  volumeMounts:
    - {name: model, mountPath: /models}
{{- end }}

{{- define "perigee.modelVolume" -}}
{{- $volume := .Values.model.volume }}
{{- $pull := .Values.model.pull.enabled }}
{{- if eq $volume.type "emptyDir" }}
{{- if not $pull }}{{ fail "model.volume.type is emptyDir, which holds a model only with model.pull.enabled" }}{{ end }}
emptyDir: {{ if $volume.emptyDir.sizeLimit }}{sizeLimit: {{ $volume.emptyDir.sizeLimit }}}{{ else }}{}{{ end }}
{{- else if eq $volume.type "claim" }}
persistentVolumeClaim: {claimName: {{ include "perigee.fullname" . }}-models}
{{- else if eq $volume.type "existingClaim" }}
persistentVolumeClaim: {claimName: {{ required "model.volume.existingClaim must name the claim" $volume.existingClaim }}}
{{- else if eq $volume.type "hostPath" }}
hostPath: {path: {{ required "model.volume.hostPath must name the folder" $volume.hostPath }}, type: {{ ternary "DirectoryOrCreate" "Directory" $pull }}}
{{- else }}
{{- if $pull }}{{ fail "model.volume.type is image, which is read-only: disable model.pull" }}{{ end }}
image: {reference: {{ required "model.volume.image.reference must name the image" $volume.image.reference }}, pullPolicy: {{ $volume.image.pullPolicy }}}
{{- end }}
{{- end }}

{{- define "perigee.diskClaim" -}}
accessModes: [ReadWriteOnce]
{{- with .storageClassName }}
storageClassName: {{ . }}
{{- end }}
resources:
  requests: {storage: {{ .size }}}
{{- end }}
