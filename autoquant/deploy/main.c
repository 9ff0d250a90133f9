/* float32 inputs on stdin, in the order of the ONNX model, to float32 outputs on stdout:
   cc -O2 main.c -lm -o model && ./model < inputs.bin > outputs.bin */
#include <math.h>
#include <stdio.h>

#include "model.h"

int main(void)
{
    static float values[AQ_INPUT_SIZE], results[AQ_OUTPUT_SIZE];
    static int8_t input[AQ_INPUT_SIZE];
    static aq_output_t output[AQ_OUTPUT_SIZE];
    while (fread(values, sizeof(float), AQ_INPUT_SIZE, stdin) == AQ_INPUT_SIZE) {
        for (int c = 0; c < AQ_INPUT_C; c++)
            for (int i = 0; i < AQ_INPUT_SIZE / AQ_INPUT_C; i++) {
                const float q = nearbyintf(values[c * (AQ_INPUT_SIZE / AQ_INPUT_C) + i] /
                                           AQ_INPUT_SCALE) + AQ_INPUT_ZERO_POINT;
                input[i * AQ_INPUT_C + c] = (int8_t)(q < -128 ? -128 : q > 127 ? 127 : q);
            }
        aq_run(input, output);
        for (int c = 0; c < AQ_OUTPUT_C; c++)
            for (int i = 0; i < AQ_OUTPUT_SIZE / AQ_OUTPUT_C; i++)
                results[c * (AQ_OUTPUT_SIZE / AQ_OUTPUT_C) + i] =
                    (output[i * AQ_OUTPUT_C + c] - AQ_OUTPUT_ZERO_POINT) *
                    aq_output_scale[c % AQ_OUTPUT_SCALES];
        fwrite(results, sizeof(float), AQ_OUTPUT_SIZE, stdout);
    }
    return 0;
}
