// SPDX-License-Identifier: Apache-2.0
package turbopocket.core.onnx

import ai.onnxruntime.NodeInfo
import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtException
import ai.onnxruntime.OrtLoggingLevel
import ai.onnxruntime.OrtSession
import ai.onnxruntime.TensorInfo
import ai.onnxruntime.platform.Fp16Conversions
import turbopocket.core.Cancelled
import turbopocket.core.Refused
import turbopocket.core.artifact.ComponentSpec
import turbopocket.core.artifact.TensorSpec
import turbopocket.core.drawing.Runtime
import turbopocket.core.drawing.Session
import turbopocket.core.drawing.Tensor
import turbopocket.core.refuse
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder

/**
 * ONNX Runtime's Java API, which is the same on Android and on a JVM, set up to stay small: no arena, no planned block.
 *
 * [operators] is the library of our codebook operators, by `make kernels`, refused where it is cut off; without it the
 * bodies in the files are run.
 * [threads] are the cores of one call, all by default; [freeBytes] says how much memory may still be used.
 */
class OnnxRuntime(
    private val operators: File? = null,
    private val threads: Int? = null,
    private val freeBytes: () -> Long? = { null },
) : Runtime {
    private val environment = OrtEnvironment.getEnvironment(OrtLoggingLevel.ORT_LOGGING_LEVEL_ERROR)

    override val target = "onnx"

    override fun availableBytes(): Long? = freeBytes()

    override fun open(component: String, spec: ComponentSpec, file: File): Session {
        operators?.let(::requireWhole)
        val options = OrtSession.SessionOptions() // open as long as the session: closing it unloads the operators
        try {
            val session = opened(component, file, options)
            try {
                requireTensors(component, "input", spec.inputs, session.inputInfo)
                requireTensors(component, "output", spec.outputs, session.outputInfo)
            } catch (error: Refused) {
                session.close()
                throw error
            }
            return OnnxSession(environment, component, spec, session, options)
        } catch (error: Refused) {
            options.close()
            throw error
        }
    }

    private fun opened(component: String, file: File, options: OrtSession.SessionOptions): OrtSession = try {
        options.setCPUArenaAllocator(false)
        options.setMemoryPatternOptimization(false)
        // which ends the process in ONNX Runtime 1.29.0 at artifacts from before manifests had `runtime`
        options.addConfigEntry(DISABLED, "FuseFp16InitializerToFp32NodeTransformer")
        options.setSessionLogLevel(OrtLoggingLevel.ORT_LOGGING_LEVEL_ERROR)
        threads?.let(options::setIntraOpNumThreads)
        operators?.let { options.registerCustomOpLibrary(it.path) }
        environment.createSession(file.path, options)
    } catch (error: OrtException) {
        throw Refused("$component: ONNX Runtime ${environment.version} cannot open it: ${error.message}", error)
    }
}

/** The session's setting of graph optimizations that are left out. */
private const val DISABLED = "optimization.disable_specified_optimizers"

private val types = mapOf(
    OnnxJavaType.FLOAT to "float32",
    OnnxJavaType.FLOAT16 to "float16",
    OnnxJavaType.INT64 to "int64",
    OnnxJavaType.INT32 to "int32",
    OnnxJavaType.UINT8 to "uint8",
    OnnxJavaType.INT8 to "int8",
    OnnxJavaType.BOOL to "bool",
)

private fun requireTensors(component: String, side: String, specs: List<TensorSpec>, found: Map<String, NodeInfo>) {
    if (found.keys != specs.mapTo(HashSet()) { it.name }) {
        val said = specs.joinToString { it.name }
        refuse("$component has ${side}s ${found.keys.joinToString()}; the manifest says $said")
    }
    for (spec in specs) {
        val info = found.getValue(spec.name).info as? TensorInfo
        val same = info != null && types[info.type] == spec.dtype && info.shape.size == spec.shape.size &&
            spec.shape.zip(info.shape.asIterable()).all { (said, is_) ->
                if (said.isString) is_ < 0 else said.content == is_.toString()
            }
        if (!same) refuse("$component: $side ${spec.name} is $info; the manifest says ${spec.dtype} ${spec.shape}")
    }
}

private class OnnxSession(
    private val environment: OrtEnvironment,
    private val component: String,
    private val spec: ComponentSpec,
    private val session: OrtSession,
    private val sessionOptions: OrtSession.SessionOptions,
) : Session {
    @Volatile private var options: OrtSession.RunOptions? = null
    @Volatile private var stopped = false

    override fun run(inputs: Map<String, Tensor>): Map<String, Tensor> {
        requireInputs(inputs)
        val given = HashMap<String, OnnxTensor>()
        try {
            for (each in spec.inputs) given[each.name] = given(each, inputs.getValue(each.name))
            OrtSession.RunOptions().use { running ->
                synchronized(this) { options = running }
                try {
                    if (stopped) throw Cancelled()
                    return session.run(given, spec.outputs.mapTo(LinkedHashSet()) { it.name }, running).use(::taken)
                } finally {
                    synchronized(this) { options = null }
                }
            }
        } catch (error: OrtException) {
            if (stopped) throw Cancelled()
            throw Refused("$component: ONNX Runtime failed: ${error.message}", error)
        } finally {
            given.values.forEach { it.close() }
        }
    }

    override fun stop() = synchronized(this) {
        stopped = true
        options?.setTerminate(true)
        Unit
    }

    override fun close() {
        session.close()
        sessionOptions.close()
    }

    /** Sizes of named dimensions are any, but one name has one size. */
    private fun requireInputs(inputs: Map<String, Tensor>) {
        if (inputs.keys != spec.inputs.mapTo(HashSet()) { it.name }) {
            val taken = spec.inputs.joinToString { it.name }
            refuse("$component takes $taken; it was given ${inputs.keys.joinToString()}")
        }
        val sizes = HashMap<String, Int>()
        for (each in spec.inputs) {
            val shape = inputs.getValue(each.name).shape
            val fits = shape.size == each.shape.size && each.shape.zip(shape.asIterable()).all { (said, size) ->
                size == if (said.isString) sizes.getOrPut(said.content) { size } else said.content.toInt()
            }
            if (!fits) refuse("$component: input ${each.name} must be ${each.shape}, found ${shape.toList()}")
        }
    }

    private fun given(spec: TensorSpec, tensor: Tensor): OnnxTensor {
        val shape = LongArray(tensor.shape.size) { tensor.shape[it].toLong() }
        val values = tensor.values
        val type = types.entries.first { it.value == spec.dtype }.key
        val bytes = ByteBuffer.allocateDirect(values.size * type.size).order(ByteOrder.nativeOrder())
        for (value in values) {
            when (type) {
                OnnxJavaType.FLOAT -> bytes.putFloat(value)
                OnnxJavaType.FLOAT16 -> bytes.putShort(Fp16Conversions.floatToFp16(value))
                OnnxJavaType.INT64 -> bytes.putLong(whole(spec, value))
                OnnxJavaType.INT32 -> bytes.putInt(whole(spec, value).toInt())
                else -> bytes.put(whole(spec, value).toByte())
            }
        }
        bytes.rewind()
        return OnnxTensor.createTensor(environment, bytes, shape, type)
    }

    private fun whole(spec: TensorSpec, value: Float): Long {
        if (value != Math.rint(value.toDouble()).toFloat()) {
            refuse("$component: input ${spec.name} is ${spec.dtype}, $value is no whole number")
        }
        return value.toLong()
    }

    private fun taken(result: OrtSession.Result): Map<String, Tensor> = result.associate { (name, value) ->
        val tensor = value as? OnnxTensor ?: refuse("$component: output $name is no tensor")
        val shape = IntArray(tensor.info.shape.size) { Math.toIntExact(tensor.info.shape[it]) }
        name to Tensor(shape, numbers(name, tensor))
    }

    private fun numbers(name: String, tensor: OnnxTensor): FloatArray = when (tensor.info.type) {
        OnnxJavaType.FLOAT, OnnxJavaType.FLOAT16 -> tensor.floatBuffer.run { FloatArray(remaining()).also { get(it) } }
        OnnxJavaType.INT64 -> tensor.longBuffer.run { FloatArray(remaining()) { get(it).toFloat() } }
        OnnxJavaType.INT32 -> tensor.intBuffer.run { FloatArray(remaining()) { get(it).toFloat() } }
        else -> refuse("$component: output $name is ${tensor.info.type}, which the loop has no use for")
    }
}
