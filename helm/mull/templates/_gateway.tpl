{{/* Pods that clients talk to: one gateway each, placed by a resource that only these pods have. */}}
{{- define "mull.gatewayGroup" -}}
groupName: gateway
replicas: {{ .Values.gateway.replicas }}
minReplicas: {{ .Values.gateway.replicas }}
maxReplicas: {{ .Values.gateway.replicas }}
resources: {CPU: "0", mull-gateway: "1"}
rayStartParams:
  object-store-memory: "200000000"
template:
  metadata:
    labels: {{- include "mull.labels" . | nindent 6 }}
    {{- with .Values.gateway.pod.annotations }}
    annotations: {{- toYaml . | nindent 6 }}
    {{- end }}
  spec:
    {{- include "mull.podSecurity" . | nindent 4 }}
      # No connection of Ray's may get a gateway's port as its own while the gateway starts, or starts again.
      sysctls:
        - name: net.ipv4.ip_local_reserved_ports
          {{- with .Values.gateway.ports }}
          value: {{ printf "%v,%v,%v" .grpc .http .metrics | quote }}
          {{- end }}
    {{- include "mull.scheduling" (list . .Values.gateway.pod) | nindent 4 }}
    {{- include "mull.spread" (list . "gateway" .Values.gateway.pod) | nindent 4 }}
    terminationGracePeriodSeconds: {{ include "mull.graceS" . }}
    initContainers:
      {{- include "mull.checkContainer" (list . "gateway") | nindent 6 }}
    containers:
      - name: gateway
        {{- include "mull.imageFields" . | nindent 8 }}
        env:
          {{- include "mull.rayEnv" . | nindent 10 }}
          {{- include "mull.logEnv" . | nindent 10 }}
          {{- range $name, $value := .Values.gateway.env }}
          - {name: {{ $name }}, value: {{ $value | quote }}}
          {{- end }}
        ports:
          - {name: grpc, containerPort: {{ .Values.gateway.ports.grpc }}}
          - {name: http, containerPort: {{ .Values.gateway.ports.http }}}
          - {name: mull-metrics, containerPort: {{ .Values.gateway.ports.metrics }}}
          - {name: metrics, containerPort: 8080}
        resources: {{- toYaml .Values.gateway.resources | nindent 10 }}
        securityContext: {{- include "mull.containerSecurity" . | nindent 10 }}
        {{- include "mull.rayProbes" . | nindent 8 }}
        # Serve starts a gateway again that stops serving; ready is it when it can take work.
        readinessProbe:
          httpGet: {path: /ready, port: mull-metrics}
          periodSeconds: 3
          timeoutSeconds: 3
          failureThreshold: 2
        lifecycle:
          preStop:
            exec:
              command: [mull, drain, --metrics-port, {{ .Values.gateway.ports.metrics | quote }}, --delay-s, "5"]
        volumeMounts:
          {{- include "mull.fileMounts" (list . "gateway") | nindent 10 }}
          - {name: shm, mountPath: /dev/shm}
    volumes:
      {{- include "mull.fileVolumes" (list . "gateway") | nindent 6 }}
      - {name: shm, emptyDir: {medium: Memory, sizeLimit: 512Mi}}
{{- end }}
